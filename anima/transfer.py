"""What the host knows, brought to the device while the host goes on.

A plain `.to("cuda")` of ordinary memory, and `torch.tensor(…, device="cuda")` as well, make the host wait until the
device has done all that it was told: then it stands idle while the host prepares what comes next.
"""

import torch


def send(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on the device, which work there waits for and the host does not; `values` itself if it lies there."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu" and values.numel():
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
