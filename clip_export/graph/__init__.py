"""Tower -> ONNX: export, passes that keep the numbers, and the proof that they did."""
