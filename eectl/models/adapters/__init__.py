"""One adapter per library, and the networks that no library has. A library is imported where a name needs it."""
