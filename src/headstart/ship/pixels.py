"""An ONNX file that takes pictures as they are decoded: resizing, cropping and normalising are inside.

    picture, uint8 [B, H, W, 3] RGB of any size  ->  logits [B, K] and probabilities [B, K], calibrated

Resizing is ONNX's own with antialias. It weighs pixels as Pillow does and rounds differently: most bytes are
equal, others differ by one, and how much that moves a probability is measured when the file is verified.
Opening a file, turning it upright and laying transparency on white stay outside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.data.preprocess import Preprocess
from headstart.ship.calibration import Calibration
from headstart.ship.formats import NotWritten

_MODES = {
    "bilinear": 'mode="linear", antialias=1, exclude_outside=1',
    "bicubic": 'mode="cubic", antialias=1, cubic_coeff_a=-0.5, exclude_outside=1',
}


def from_pixels(path: Path, out: Path, preprocess: Preprocess, calibration: Calibration) -> None:
    """Put the preprocessing in front of a network, and the calibration behind it.

    Args:
        path: an ONNX file as `ship.formats.to_onnx` writes it.
        out: where the new file goes.
        preprocess: of the network's pictures.
        calibration: of its probabilities.

    Raises:
        NotWritten: a way of preparing pictures that ONNX has no form for.
    """
    import onnx
    from onnx import compose, parser

    what = "ONNX with preprocessing"
    if preprocess.interpolation not in _MODES:
        allowed = " and ".join(_MODES)
        raise NotWritten(what, f"ONNX resizes by {allowed}; this one wants {preprocess.interpolation}.")
    if preprocess.crop_mode == "border" or preprocess.side < preprocess.size:
        raise NotWritten(what, "its pictures are padded, which the graph does not do.")
    model = onnx.load(path)
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    head = f'<ir_version: {model.ir_version}, opset_import: ["" : {opset}]>\n'
    classes = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    whole: Any = compose.merge_models(
        compose.add_prefix(parser.parse_model(head + _before(preprocess)), "before_", rename_inputs=False),
        model,
        io_map=[("before_prepared", "pixels")],
    )
    whole = compose.merge_models(
        whole,
        parser.parse_model(head + _after(calibration, classes)),
        io_map=[("logits", "after_logits")],
        outputs=["after_same", "probabilities"],
    )
    _rename(whole, "after_same", "logits")
    del whole.metadata_props[:]
    whole.metadata_props.extend(model.metadata_props)
    onnx.save(whole, out)


def _before(preprocess: Preprocess) -> str:
    """The preprocessing, as ONNX writes graphs down."""
    size, side = preprocess.size, preprocess.side
    if preprocess.crop_mode == "squash":
        target = f"target = Constant<value = int64[2] {{{side}, {side}}}>()"
    else:  # the division cuts off, as Pillow's caller does
        target = f"""height_width = Shape<start=2>(planes)
  short = ReduceMin<keepdims=1>(height_width)
  side = Constant<value = int64[1] {{{side}}}>()
  wanted = Mul(height_width, side)
  target = Div(wanted, short)"""
    mean, std = (
        ", ".join(repr(float(value)) for value in values) for values in (preprocess.mean, preprocess.std)
    )
    return f"""
before (uint8[batch, height, width, 3] picture) => (float[batch, 3, {size}, {size}] prepared) {{
  planes = Transpose<perm=[0, 3, 1, 2]>(picture)
  {target}
  rest = Shape<start=0, end=2>(planes)
  shape = Concat<axis=0>(rest, target)
  resized = Resize<{_MODES[preprocess.interpolation]}>(planes, , , shape)
  now = Shape<start=2>(resized)
  size = Constant<value = int64[2] {{{size}, {size}}}>()
  over = Sub(now, size)
  float_over = Cast<to=1>(over)
  two = Constant<value = float[1] {{2.0}}>()
  half = Div(float_over, two)
  even = Round(half)
  start = Cast<to=7>(even)
  end = Add(start, size)
  axes = Constant<value = int64[2] {{2, 3}}>()
  cropped = Slice(resized, start, end, axes)
  bytes = Cast<to=1>(cropped)
  full = Constant<value = float[1] {{255.0}}>()
  unit = Div(bytes, full)
  mean = Constant<value = float[1, 3, 1, 1] {{{mean}}}>()
  centred = Sub(unit, mean)
  std = Constant<value = float[1, 3, 1, 1] {{{std}}}>()
  prepared = Div(centred, std)
}}"""


def _after(calibration: Calibration, classes: int) -> str:
    return f"""
after (float[batch, {classes}] after_logits)
  => (float[batch, {classes}] after_same, float[batch, {classes}] probabilities) {{
  after_same = Identity(after_logits)
  after_temperature = Constant<value = float[1] {{{calibration.temperature!r}}}>()
  after_scaled = Div(after_logits, after_temperature)
  probabilities = Softmax<axis=1>(after_scaled)
}}"""


def _rename(model: Any, old: str, new: str) -> None:
    """Give an output a name that is taken inside; the inner tensor makes room."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = f"inner_{new}" if name == new else new if name == old else name
    for output in model.graph.output:
        if output.name == old:
            output.name = new
    for value in model.graph.value_info:
        if value.name == new:
            value.name = f"inner_{new}"
