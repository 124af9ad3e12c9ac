"""Block sizes of the TPU kernels, by chip generation. Read by tpu.py; the generation is an argument, never asked for.

They follow from four figures of a chip, which jax publishes as pltpu.get_tpu_info_for_chip: HBM bandwidth says how many
bytes must be in flight to hide a latency of about 2 us, the ratio of matrix throughput to bandwidth says how many query
tokens must share a read of the KV, and VMEM bounds both.

    generation   HBM GB/s   bf16 TFLOP/s   VMEM MiB   in flight in 2 us
    v5e             820          197          128          1.6 MB
    v5p           2,460          459           64          4.9 MB (two cores seen as one)
    v6e           1,640          920          128          3.3 MB
    TPU7x         3,700        1,155           64          7.4 MB (of one of a chip's two devices)

A token's KV takes 4 KB at 8 kv heads of 128 in bfloat16, so 512 tokens are 2 MB. What a model with more heads takes is
checked by the compiler against `vmem_limit_bytes`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Sizes of the attention kernel's work.

    Attributes:
        block_kv: key positions that are fetched and computed at once; a multiple of the page size, or one page.
        buffers: blocks of KV in VMEM; all but one are in flight.
        block_q: query tokens of one block of a row with more than one.
        vmem_limit_bytes: what one kernel may use of VMEM.
    """

    block_kv: int
    buffers: int
    block_q: int
    vmem_limit_bytes: int


_MIB = 1 << 20

#: By the kind that jax gives a device.
TILES = {
    "TPU v5 lite": Tiles(block_kv=512, buffers=3, block_q=64, vmem_limit_bytes=96 * _MIB),
    "TPU v5": Tiles(block_kv=512, buffers=4, block_q=64, vmem_limit_bytes=56 * _MIB),
    "TPU v6 lite": Tiles(block_kv=512, buffers=4, block_q=128, vmem_limit_bytes=96 * _MIB),
    "TPU7x": Tiles(block_kv=512, buffers=4, block_q=64, vmem_limit_bytes=56 * _MIB),
}
#: Of a generation that is not in the table: small enough for any.
DEFAULT_TILES = Tiles(block_kv=256, buffers=3, block_q=32, vmem_limit_bytes=14 * _MIB)


def tiles_for(kind: str) -> Tiles:
    """The sizes for a device kind."""
    return TILES.get(kind, DEFAULT_TILES)
