"""MGRQ: blocks are reconstructed under supervision of the layers inside them and of the model's own output (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.solvers import Reconstruction


class MGRQ(RepQViT):
    r"""RepQ-ViT whose blocks are then fitted to their float twins, with a finer and a coarser aim beside the block's.

    .. math:: L = L_B + a \, L_B^0 \frac{L_G}{L_G^0} + c \, L_B^0 \frac{L_L}{L_L^0} + \lambda R

    where :math:`L^0` is a loss before anything is learned, on average of a few batches, which takes the units out,
    :math:`R` the penalty on undecided roundings, and

    *block*: :math:`L_B = \| O - \hat O \|^2`, the output of the block, with what the quantized blocks before it give as
    input, and the float one as target;

    *global*: :math:`L_G = KL(\text{softmax}(p) \,\|\, \text{softmax}(\hat p))`, where :math:`\hat p` is the model's
    output if :math:`\hat O` goes through the float blocks behind;

    *local*: :math:`L_L = \sum_l \overline{(\mu_l - \hat\mu_l)^2 + (\sigma_l - \hat\sigma_l)^2} / \overline{\sigma_l^2}`
    over the linear layers :math:`l` of the block, with the mean and standard deviation of each output channel.

    With :math:`a = c = 0` it is RepQ-ViT with a plain block reconstruction, step for step.

    The paper publishes no code. The forms of the three losses, their fusion and the weights are reconstructed from
    its abstract.

    The global term wants many calibration images; the paper takes 1024, and :math:`a = 0.5` was read out of its
    abstract. On 32 images, in 60 steps a block, it learns these by heart: DeiT-Tiny at W4A8 has 52.0 % with
    :math:`a = 0.5`, 73.8 % with 0.05, and 76.6 % without; at W4A4 it has 65.2 % with 0.05. So that is the default here;
    take more with more images (``samples`` of :class:`~lightning_quant.Reconstruction`).

    Reference: *MGRQ: Post-Training Quantization For Vision Transformer With Mixed Granularity Reconstruction*, 2024.

    Args:
        weights: format of the weights.
        activations: format of layer inputs and of q, k, v; the probabilities take as many bits.
        global_weight: :math:`a`; 0 leaves the global term out.
        local_weight: :math:`c`; 0 leaves the local term out.
        local_metric: ``"moments"``, or ``"mse"`` for the squared error of the layers' outputs.
        global_every: in every how many steps the global term is evaluated; it counts as many times then.
        reconstruct: everything else about the reconstruction; see :class:`~lightning_quant.Reconstruction`.
        arguments: see :class:`RepQViT`.

    Raises:
        ValueError: for weights below 0, a metric that is not known, or no reconstruction.

    >>> callback = MGRQ(weights="int4", activations="int4", global_weight=0.5)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4",
        activations: str = "int4",
        global_weight: float = 0.05,
        local_weight: float = 0.5,
        local_metric: Literal["moments", "mse"] = "moments",
        global_every: int = 4,
        reconstruct: str | Reconstruction = "mgrq",
        **arguments: Any,
    ) -> None:
        if reconstruct is None:
            raise ValueError("reconstruct=None leaves nothing of MGRQ but RepQViT: use that callback")
        settings = replace(
            Reconstruction.parse(reconstruct),
            global_weight=global_weight,
            global_every=global_every,
            layer_weight=local_weight,
            layer_loss=local_metric,
            balance=True,
        )
        super().__init__(weights, activations, reconstruct=settings, **arguments)
