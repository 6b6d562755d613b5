"""Take the time that work needs on a device, and name the device. What is measured, and how often, is the caller's choice."""

import platform
import time

import torch


def settle(device: torch.device) -> None:
    """Wait until the device has finished all work that it was given; on a CPU there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Takes the times of successive laps on a device. On a GPU it does not wait for the device: it records CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        settle(device)
        self.lap()

    def lap(self) -> None:
        """End a lap with the work that the device was given so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            settle(self._device)
            self._times.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Return the seconds from the start to the end of each lap, so they grow from lap to lap."""
        settle(self._device)
        if self._events:
            return [self._events[0].elapsed_time(event) / 1000 for event in self._events[1:]]
        return [each - self._times[0] for each in self._times[1:]]


def device_name(device: torch.device) -> str:
    """Return the device in words, for a table's title: a GPU's name, or a CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return device.type
