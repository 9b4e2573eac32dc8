//! What the binary carries, so that the first command after an installation has something real to do.

/// The model: MobileNet v1 0.75, 8 bits, 1,001 ImageNet classes (see assets/README.md for source and licence).
pub const MODEL: &[u8] = include_bytes!("../../../assets/mobilenet_v1_0.75_192_quant.onnx");

/// What messages and receipts call it.
pub const MODEL_NAME: &str = "mobilenet_v1_0.75_192_quant.onnx";

/// A picture of a cup of espresso.
pub const PICTURE: &[u8] = include_bytes!("../../../assets/coffee.jpg");

/// Its file name, which tells the format.
pub const PICTURE_NAME: &str = "coffee.jpg";

/// The classes, one a line.
pub const LABELS: &str = include_str!("../../../assets/imagenet_labels.txt");
