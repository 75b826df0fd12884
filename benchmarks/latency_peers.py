"""The contenders of the latency table. Each takes a float model and a batch, and gives a function that answers it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_quant import KernelSwap, PostTrainingQuantization

Run = Callable[[], Any]


def float32_eager(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return lambda: model(inputs)


def bfloat16_eager(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _in_bfloat16(lambda: model(inputs))


def float32_compiled(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    compiled = torch.compile(model)
    return _in_inference(lambda: compiled(inputs))


# ---------------------------------------------------------------- ours


class _Module(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)


def _calibrated(model: nn.Module, inputs: Tensor, **arguments: Any) -> _Module:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = _Module(model)
    ptq = PostTrainingQuantization(ranges="minmax", calibration_samples=len(inputs), **arguments)
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[ptq], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.validate(module, torch.utils.data.DataLoader(inputs, batch_size=len(inputs)), verbose=False)
    return module.eval()


def simulated(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    module = _calibrated(model, inputs, attention=False)
    return lambda: module(inputs)


def _ours(model: nn.Module, inputs: Tensor, swap: KernelSwap, **arguments: Any) -> Run:
    module = _calibrated(model, inputs, **arguments)
    swap.swap(module)
    _in_inference(lambda: module(inputs))()
    swap.settle()
    return lambda: module(inputs)


def _ours_mixed(model: nn.Module, inputs: Tensor, swap: KernelSwap, **arguments: Any) -> Run:
    """As ``Trainer(precision="bf16-mixed")`` runs it."""
    module = _calibrated(model, inputs, **arguments)
    swap.swap(module)
    run = _in_bfloat16(lambda: module(inputs))
    with torch.inference_mode(), swap.looking(module):
        run()
    swap.settle()
    return run


def ours(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap(), attention=False)


def ours_mixed(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours_mixed(model, inputs, KernelSwap(), attention=False)


def ours_with_attention(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap())


def ours_int8_everywhere(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap(backend="torch"), attention=False)


def ours_on_openvino(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap(backend="openvino"), attention=False)


def ours_on_openvino_with_attention(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap(backend="openvino"))


def ours_seven_bits(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap(backend="torch"), attention=False, activations="int7")


def ours_on_torchao(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _ours(model, inputs, KernelSwap("torchao", compile=True), attention=False)


# ---------------------------------------------------------------- others


def torchao_dynamic(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)
    return _in_inference(lambda: compiled(inputs))


def _onnx(model: nn.Module, inputs: Tensor) -> Path:
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    torch.onnx.export(model, (inputs,), path, dynamo=True, verbose=False, external_data=False)
    return path


def _session(path: Path, inputs: Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)


def onnxruntime_float(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _session(_onnx(model, inputs), inputs, threads)


def onnxruntime_dynamic(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    from onnxruntime.quantization import quantize_dynamic

    path = _onnx(model, inputs)
    quantize_dynamic(path, path.with_suffix(".int8.onnx"))
    return _session(path.with_suffix(".int8.onnx"), inputs, threads)


def onnxruntime_static(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: inputs.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    path = _onnx(model, inputs)
    import onnx

    name = onnx.load(path).graph.input[0].name
    quantize_static(path, path.with_suffix(".int8.onnx"), Once(name), per_channel=True)
    return _session(path.with_suffix(".int8.onnx"), inputs, threads)


def _openvino(model: nn.Module, inputs: Tensor, threads: int, int8: bool) -> Run:
    import openvino

    converted = openvino.convert_model(model, example_input=inputs)
    if int8:
        import nncf

        nncf.set_log_level(logging.ERROR)
        converted = nncf.quantize(converted, nncf.Dataset([inputs.numpy()]), subset_size=1)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    array = inputs.numpy()
    return lambda: compiled(array)


def openvino_float(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _openvino(model, inputs, threads, int8=False)


def openvino_int8(model: nn.Module, inputs: Tensor, threads: int) -> Run:
    return _openvino(model, inputs, threads, int8=True)


def _in_inference(run: Run) -> Run:
    return torch.inference_mode()(run)


def _in_bfloat16(run: Run) -> Run:
    return torch.autocast("cpu", torch.bfloat16)(run)


PEERS = {
    "float32 eager": float32_eager,
    "bfloat16 eager": bfloat16_eager,
    "float32 compiled": float32_compiled,
    "lightning_quant simulated": simulated,
    "lightning_quant": ours,
    "lightning_quant, bf16-mixed": ours_mixed,
    "lightning_quant, attention too": ours_with_attention,
    "lightning_quant, int8 wherever taken": ours_int8_everywhere,
    "lightning_quant, 7-bit activations": ours_seven_bits,
    "lightning_quant on OpenVINO": ours_on_openvino,
    "lightning_quant on OpenVINO, attention too": ours_on_openvino_with_attention,
    "lightning_quant on torchao, compiled": ours_on_torchao,
    "torchao int8 dynamic, compiled": torchao_dynamic,
    "ONNX Runtime float32": onnxruntime_float,
    "ONNX Runtime int8 dynamic": onnxruntime_dynamic,
    "ONNX Runtime int8 static": onnxruntime_static,
    "OpenVINO float32": openvino_float,
    "OpenVINO + NNCF int8": openvino_int8,
}
