//! Readers and writers: ONNX, NumPy, images.
