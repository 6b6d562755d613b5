"""Time as a device spends it, and how a measurement names the machine. Measures nothing by itself."""

import platform
import time

import torch


def settle(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Laps on a device, without making it wait: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        settle(device)
        self.lap()

    def lap(self) -> None:
        """What was given to the device so far ends a lap."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            settle(self._device)
            self._times.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from the start to the end of each lap."""
        settle(self._device)
        if self._events:
            return [self._events[0].elapsed_time(event) / 1000 for event in self._events[1:]]
        return [each - self._times[0] for each in self._times[1:]]


def device_name(device: torch.device) -> str:
    """The device in words, for a table's title: the GPU's name, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return device.type
