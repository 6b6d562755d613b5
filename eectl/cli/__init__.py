"""The command line: parse, call one verb, print. One module per panel of `eectl --help`. No torch at import."""
