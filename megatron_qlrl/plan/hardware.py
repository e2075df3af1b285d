"""Names every number that a plan assumes about a GPU and the software on it."""

from dataclasses import dataclass, fields

from megatron_qlrl.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One GPU with its share of node and network.

    Attributes:
        memory_bytes: the GPU's total memory as torch reports it.
        bf16_flops, fp8_flops: dense peak of the tensor cores, in FLOP/s.
        bandwidth: bandwidth of the GPU's memory, in bytes/s.
        nvlink: between the GPUs of a node, in bytes/s each way.
        network: between nodes, in bytes/s for each GPU.
        host_copy: between GPU and pageable host memory, in bytes/s.
        pinned_copy: between GPU and pinned host memory, in bytes/s, all GPUs of a node at once.
        gpus_per_node: the largest tensor parallel size.
        training_efficiency: share of the BF16 peak that an update reaches without communication.
        link_efficiency: share of nvlink and network that collectives reach; none are overlapped.
        fp8_efficiency: share of the FP8 peak that FP8 linear layers reach.
        prefill_efficiency: share of the BF16 peak that the engine reaches while it reads prompts.
        decode_efficiency: share of the bandwidth that the engine reaches while it generates.
        decode_step_s: time of a generation step beside reading memory.
        framework_bytes: CUDA context, NCCL, cuBLAS and Transformer Engine workspaces.
        fragmentation: what torch's allocator holds unused, as a share of activations and working
            memory.
        asleep_bytes: what the sleeping engine keeps (CUDA graphs, communicators).
        engine_bytes: what the engine, awake, takes beside weights and key/value cache.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp8_flops: float
    bandwidth: float
    nvlink: float = 450e9
    gpus_per_node: int = 8
    # From here on nothing was measured for this package.
    training_efficiency: float = 0.45
    fp8_efficiency: float = 0.35
    link_efficiency: float = 0.70
    prefill_efficiency: float = 0.45
    decode_efficiency: float = 0.60
    decode_step_s: float = 0.005
    network: float = 50e9
    host_copy: float = 5e9
    pinned_copy: float = 20e9
    framework_bytes: float = 3 * GIB
    fragmentation: float = 0.05
    asleep_bytes: float = 2 * GIB
    engine_bytes: float = 4 * GIB

    def assumptions(self) -> dict[str, float]:
        """Returns the numbers that nobody measured for this package, by name."""
        names = [field.name for field in fields(self)]
        assumed = names[names.index("training_efficiency") :]
        return {name: float(getattr(self, name)) for name in assumed}


# Peaks, bandwidth and NVLink: NVIDIA's H100 and H200 data sheets (SXM, dense = half of the figure
# "with sparsity"); network: one 400 Gbit/s adapter for each GPU, as in a DGX H100. Memory: what
# torch reports, a little below the nominal 80 and 141 GB.
HARDWARE = {
    "h100-80g": Hardware("h100-80g", 79.1 * GIB, 989e12, 1979e12, 3.35e12),
    "h200-141g": Hardware("h200-141g", 139.8 * GIB, 989e12, 1979e12, 4.8e12),
}


def find_hardware(name: str) -> Hardware:
    """Returns the hardware of this name.

    Raises:
        ConfigError: the name is not known.
    """
    if name not in HARDWARE:
        raise ConfigError(f"--hardware {name} is not known; use one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


# What the driver calls a GPU -> its entry above.
_DEVICES = {"NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA H200": "h200-141g"}


def peak_flops(device: str) -> float | None:
    """Returns the dense bfloat16 peak of a GPU by the driver's name for it, or None."""
    name = _DEVICES.get(device)
    return HARDWARE[name].bf16_flops if name else None
