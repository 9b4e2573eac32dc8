//! Pictures as model inputs: decoding, resizing and normalising as a [`Preprocess`] declares.
//!
//! ```
//! use lightering_formats::image::{Picture, Preprocess};
//! let picture = Picture::from_rgb(2, 2, vec![255; 12]).unwrap();
//! let how: Preprocess = "resize=4,mean=127.5,std=127.5,layout=nchw".parse().unwrap();
//! let prepared = how.apply(&picture).unwrap();
//! assert_eq!(prepared.tensor.dims(), [1, 3, 4, 4]);
//! assert!(prepared.tensor.as_slice::<f32>().iter().all(|v| *v == 1.0));
//! ```

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::io::Cursor;
use std::str::FromStr;

use ::image::{ImageDecoder, ImageReader, metadata::Orientation};

use lightering_graph::{DType, Tensor};

use crate::{Error, Result};

/// Most pixels of a picture that is decoded, and of one that is made by resizing.
pub const MAX_PIXELS: u64 = 64 << 20;
/// Largest width and height.
pub const MAX_SIDE: u32 = 65_535;
/// Most memory that a decoder may take.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// A decoded picture, 8 bits per channel, RGB, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Picture {
    /// A picture from its pixels, `[height, width, 3]`.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Result<Picture> {
        check_size("picture", u64::from(width), u64::from(height))?;
        if width == 0 || height == 0 || rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
            return Err(Error::invalid(
                "picture",
                format!("{} bytes for {width}x{height} pixels", rgb.len()),
                "three bytes for each of at least one pixel",
            ));
        }
        Ok(Picture { width, height, rgb })
    }

    /// Decodes PNG, JPEG, BMP, GIF (first frame) or WebP, whichever the bytes are. A picture whose file says that the
    /// camera was turned is turned upright; transparency is dropped.
    pub fn decode(bytes: &[u8]) -> Result<Picture> {
        let broken = |e: ::image::ImageError| match e {
            ::image::ImageError::Unsupported(e) => Error::unsupported("picture", e),
            ::image::ImageError::Limits(e) => {
                Error::corrupt("picture", format!("{e}; at most {MAX_PIXELS} pixels are decoded"))
            }
            ::image::ImageError::IoError(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => {
                Error::io("picture", e)
            }
            e => Error::corrupt("picture", e),
        };
        let mut limits = ::image::Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_DECODER_BYTES);
        let mut reader = ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|e| Error::io("picture", e))?;
        if reader.format().is_none() {
            return Err(Error::invalid("picture", "an unknown format", "PNG, JPEG, BMP, GIF or WebP"));
        }
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(broken)?;
        let (width, height) = decoder.dimensions();
        check_size("picture", u64::from(width), u64::from(height))?;
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut decoded = ::image::DynamicImage::from_decoder(decoder).map_err(broken)?;
        decoded.apply_orientation(orientation);
        let rgb = decoded.into_rgb8();
        Picture::from_rgb(rgb.width(), rgb.height(), rgb.into_raw())
    }

    /// Width and height that [`decode`](Self::decode) will yield, from the header alone.
    pub fn dimensions(bytes: &[u8]) -> Result<(u32, u32)> {
        let reader = ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|e| Error::io("picture", e))?;
        if reader.format().is_none() {
            return Err(Error::invalid("picture", "an unknown format", "PNG, JPEG, BMP, GIF or WebP"));
        }
        let mut decoder = reader.into_decoder().map_err(|e| Error::corrupt("picture", e))?;
        let (width, height) = decoder.dimensions();
        check_size("picture", u64::from(width), u64::from(height))?;
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let lies = matches!(
            orientation,
            Orientation::Rotate90
                | Orientation::Rotate270
                | Orientation::Rotate90FlipH
                | Orientation::Rotate270FlipH
        );
        Ok(if lies { (height, width) } else { (width, height) })
    }

    /// Bytes that [`decode`](Self::decode) will hold at its peak, the encoded bytes not counted, so that memory can be
    /// asked for before a picture is decoded.
    pub fn decoding_bytes(bytes: &[u8]) -> Result<u64> {
        let reader = ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|e| Error::io("picture", e))?;
        if reader.format().is_none() {
            return Err(Error::invalid("picture", "an unknown format", "PNG, JPEG, BMP, GIF or WebP"));
        }
        let mut decoder = reader.into_decoder().map_err(|e| Error::corrupt("picture", e))?;
        let (width, height) = decoder.dimensions();
        check_size("picture", u64::from(width), u64::from(height))?;
        let rgb = u64::from(width) * u64::from(height) * 3;
        let turned = decoder.orientation().unwrap_or(Orientation::NoTransforms) != Orientation::NoTransforms;
        let copy = if turned || decoder.color_type() != ::image::ColorType::Rgb8 { rgb } else { 0 };
        // A progressive JPEG keeps the coefficients of the whole picture, two bytes each, until its last scan.
        let coefficients = if is_progressive_jpeg(bytes) { 2 * rgb } else { 0 };
        Ok(decoder.total_bytes().saturating_add(copy).saturating_add(coefficients))
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The pixels, `[height, width, 3]`.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }
}

/// Looks for the frame header among the marker segments before the first scan.
fn is_progressive_jpeg(bytes: &[u8]) -> bool {
    let mut rest = match bytes {
        [0xff, 0xd8, rest @ ..] => rest,
        _ => return false,
    };
    while let [0xff, marker, high, low, ..] = *rest {
        match marker {
            0xc2 | 0xc6 | 0xca | 0xce => return true,
            0xda => return false,
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        rest = rest.get(2 + length..).unwrap_or_default();
    }
    false
}

fn check_size(place: &str, width: u64, height: u64) -> Result<()> {
    let pixels = width.saturating_mul(height);
    if pixels > MAX_PIXELS {
        return Err(Error::limit(place, format!("number of pixels ({width}x{height})"), pixels, MAX_PIXELS));
    }
    if width.max(height) > u64::from(MAX_SIDE) {
        return Err(Error::limit(place, "side in pixels", width.max(height), u64::from(MAX_SIDE)));
    }
    Ok(())
}

/// How a pixel between pixels is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Linear in both directions.
    Bilinear,
    /// Cubic (a = -0.5 with antialias, -0.75 without, as the usual libraries have it).
    Bicubic,
}

/// How a picture of another aspect ratio is brought to the wanted size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Both sides are scaled on their own.
    Stretch,
    /// Scaled until it covers the size, the rest cut off on both sides.
    Cover,
    /// Scaled until it fits into the size, the rest filled on both sides.
    Letterbox,
}

/// The order of the axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Layout {
    Nchw,
    Nhwc,
    Chw,
    Hwc,
}

/// The order of the channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
    /// One channel of brightness (ITU-R 601).
    Gray,
}

/// The element type of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Normalised floats.
    F32,
    /// Rounded and clamped to 0..=255.
    U8,
}

/// What is done to a picture before a model sees it: steps in the order of the fields, then
/// `(pixel / scale - mean) / std` per channel.
///
/// Written as `key=value` pairs joined by commas: `resize=224`, `resize=320x240` (width first), `short=256` (the
/// shorter side, aspect kept), `crop=224` (centre), `fit=stretch|cover|letterbox`, `pad=114`,
/// `filter=nearest|bilinear|bicubic`, `antialias=on|off`, `scale=255`, `mean=0.485:0.456:0.406`,
/// `std=0.229:0.224:0.225`, `layout=nchw|nhwc|chw|hwc`, `order=rgb|bgr|gray`, `dtype=f32|u8`.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocess {
    /// Length that the shorter side is scaled to first.
    pub short: Option<u32>,
    /// Width and height that the picture is scaled to.
    pub resize: Option<(u32, u32)>,
    /// Width and height that are cut from the centre at last.
    pub crop: Option<(u32, u32)>,
    /// What `resize` does when the aspect ratio is another one.
    pub fit: Fit,
    /// The value of the filled border, 0 to 255.
    pub pad: f32,
    /// How pixels between pixels are made.
    pub filter: Filter,
    /// Whether the filter widens when it shrinks a picture.
    pub antialias: bool,
    /// What pixel values are divided by.
    pub scale: f32,
    /// What is subtracted, per channel in the order of the result.
    pub mean: [f32; 3],
    /// What the difference is divided by, per channel in the order of the result.
    pub std: [f32; 3],
    /// The order of the axes.
    pub layout: Layout,
    /// The order of the channels.
    pub order: Order,
    /// The element type.
    pub dtype: Output,
}

impl Default for Preprocess {
    fn default() -> Self {
        Preprocess {
            short: None,
            resize: None,
            crop: None,
            fit: Fit::Stretch,
            pad: 114.0,
            filter: Filter::Bilinear,
            antialias: true,
            scale: 1.0,
            mean: [0.0; 3],
            std: [1.0; 3],
            layout: Layout::Nchw,
            order: Order::Rgb,
            dtype: Output::F32,
        }
    }
}

/// A picture made ready, and how to get back to the pixels of the original.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The model's input.
    pub tensor: Tensor,
    /// Pixels of the result per pixel of the original: horizontally, vertically.
    pub scale: (f32, f32),
    /// Where the original's corner lies in the result; negative if it was cut off.
    pub offset: (f32, f32),
}

impl Prepared {
    /// The place in the original picture of a place in the result.
    pub fn to_original(&self, x: f32, y: f32) -> (f32, f32) {
        ((x - self.offset.0) / self.scale.0, (y - self.offset.1) / self.scale.1)
    }
}

impl FromStr for Preprocess {
    type Err = Error;

    fn from_str(text: &str) -> Result<Preprocess> {
        let mut out = Preprocess::default();
        let mut seen: Vec<&str> = Vec::new();
        for pair in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                Error::invalid("preprocessing", format!("{pair:?}"), "key=value pairs joined by commas")
            })?;
            let (key, value) = (key.trim(), value.trim());
            if seen.contains(&key) {
                return Err(Error::invalid("preprocessing", format!("{key:?} twice"), "each key once"));
            }
            seen.push(key);
            let bad = |expected: &str| Error::invalid("preprocessing", format!("{key}={value:?}"), expected);
            match key {
                "short" => out.short = Some(side(value).ok_or_else(|| bad("a number of pixels"))?),
                "resize" => {
                    out.resize = Some(sides(value).ok_or_else(|| bad("pixels, such as 224 or 320x240"))?);
                }
                "crop" => {
                    out.crop = Some(sides(value).ok_or_else(|| bad("pixels, such as 224 or 320x240"))?);
                }
                "fit" => {
                    out.fit = match value {
                        "stretch" => Fit::Stretch,
                        "cover" => Fit::Cover,
                        "letterbox" => Fit::Letterbox,
                        _ => return Err(bad("stretch, cover or letterbox")),
                    };
                }
                "pad" => {
                    out.pad = number(value)
                        .filter(|v| (0.0..=255.0).contains(v))
                        .ok_or_else(|| bad("a number from 0 to 255"))?;
                }
                "filter" => {
                    out.filter = match value {
                        "nearest" => Filter::Nearest,
                        "bilinear" => Filter::Bilinear,
                        "bicubic" => Filter::Bicubic,
                        _ => return Err(bad("nearest, bilinear or bicubic")),
                    };
                }
                "antialias" => {
                    out.antialias = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad("on or off")),
                    };
                }
                "scale" => {
                    out.scale =
                        number(value).filter(|v| *v != 0.0).ok_or_else(|| bad("a number other than 0"))?;
                }
                "mean" => {
                    out.mean = channels(value).ok_or_else(|| bad("one number, or three joined by colons"))?
                }
                "std" => {
                    out.std = channels(value)
                        .filter(|v| v.iter().all(|v| *v != 0.0))
                        .ok_or_else(|| bad("one number other than 0, or three joined by colons"))?;
                }
                "layout" => {
                    out.layout = match value {
                        "nchw" => Layout::Nchw,
                        "nhwc" => Layout::Nhwc,
                        "chw" => Layout::Chw,
                        "hwc" => Layout::Hwc,
                        _ => return Err(bad("nchw, nhwc, chw or hwc")),
                    };
                }
                "order" => {
                    out.order = match value {
                        "rgb" => Order::Rgb,
                        "bgr" => Order::Bgr,
                        "gray" => Order::Gray,
                        _ => return Err(bad("rgb, bgr or gray")),
                    };
                }
                "dtype" => {
                    out.dtype = match value {
                        "f32" => Output::F32,
                        "u8" => Output::U8,
                        _ => return Err(bad("f32 or u8")),
                    };
                }
                _ => {
                    return Err(Error::invalid(
                        "preprocessing",
                        format!("the key {key:?}"),
                        "one of short, resize, crop, fit, pad, filter, antialias, scale, mean, std, layout, \
                         order, dtype",
                    ));
                }
            }
        }
        for (width, height) in [out.resize, out.crop].into_iter().flatten() {
            check_size("preprocessing", u64::from(width), u64::from(height))?;
        }
        Ok(out)
    }
}

fn number(text: &str) -> Option<f32> {
    text.parse::<f32>().ok().filter(|v| v.is_finite())
}

fn side(text: &str) -> Option<u32> {
    text.parse().ok().filter(|v| (1..=MAX_SIDE).contains(v))
}

fn sides(text: &str) -> Option<(u32, u32)> {
    match text.split_once('x') {
        None => side(text).map(|s| (s, s)),
        Some((width, height)) => Some((side(width)?, side(height)?)),
    }
}

fn channels(text: &str) -> Option<[f32; 3]> {
    let values: Vec<f32> = text.split(':').map(number).collect::<Option<_>>()?;
    match values.as_slice() {
        [one] => Some([*one; 3]),
        [r, g, b] => Some([*r, *g, *b]),
        _ => None,
    }
}

impl fmt::Display for Preprocess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = |p: (u32, u32)| if p.0 == p.1 { p.0.to_string() } else { format!("{}x{}", p.0, p.1) };
        let mut parts = Vec::new();
        parts.extend(self.short.map(|s| format!("short={s}")));
        parts.extend(self.resize.map(|p| format!("resize={}", pair(p))));
        parts.extend(self.crop.map(|p| format!("crop={}", pair(p))));
        parts.push(format!("fit={}", format!("{:?}", self.fit).to_lowercase()));
        parts.push(format!("pad={}", self.pad));
        parts.push(format!("filter={}", format!("{:?}", self.filter).to_lowercase()));
        parts.push(format!("antialias={}", if self.antialias { "on" } else { "off" }));
        parts.push(format!("scale={}", self.scale));
        parts.push(format!("mean={}:{}:{}", self.mean[0], self.mean[1], self.mean[2]));
        parts.push(format!("std={}:{}:{}", self.std[0], self.std[1], self.std[2]));
        parts.push(format!("layout={}", format!("{:?}", self.layout).to_lowercase()));
        parts.push(format!("order={}", format!("{:?}", self.order).to_lowercase()));
        parts.push(format!("dtype={}", format!("{:?}", self.dtype).to_lowercase()));
        f.write_str(&parts.join(","))
    }
}

/// A picture, channels last, while it is being worked on.
struct Plane<'a> {
    width: usize,
    height: usize,
    values: Values<'a>,
}

/// The original stays in bytes: in floats, a photograph alone would take hundreds of megabytes. So does a result that
/// leaves as bytes anyway.
enum Values<'a> {
    Bytes(Cow<'a, [u8]>),
    Floats(Vec<f32>),
}

impl Plane<'_> {
    /// Copies `out.len()` values of row `y` from column `x` on.
    fn copy_row(&self, x: usize, y: usize, out: &mut [f32]) {
        let start = (y * self.width + x) * 3;
        match &self.values {
            Values::Bytes(bytes) => {
                out.iter_mut().zip(&bytes[start..]).for_each(|(out, v)| *out = f32::from(*v));
            }
            Values::Floats(floats) => out.copy_from_slice(&floats[start..start + out.len()]),
        }
    }
}

impl Preprocess {
    /// The size of the result for a picture of this size: width, height.
    fn output_size(&self, width: u32, height: u32) -> (u32, u32) {
        let mut size = (width, height);
        if let Some(short) = self.short {
            size = scaled_short(size, short);
        }
        size = self.resize.unwrap_or(size);
        self.crop.unwrap_or(size)
    }

    /// The size to which a picture is scaled to fit into, or to cover, `to`.
    fn scaled(&self, from: (u32, u32), to: (u32, u32)) -> (u32, u32) {
        let ratios = (f64::from(to.0) / f64::from(from.0), f64::from(to.1) / f64::from(from.1));
        let side = |ratio: f64, length: u32| (ratio * f64::from(length)).round().clamp(1.0, 4e9) as u32;
        match self.fit {
            Fit::Stretch => to,
            Fit::Cover => {
                let ratio = ratios.0.max(ratios.1);
                (side(ratio, from.0).max(to.0), side(ratio, from.1).max(to.1))
            }
            Fit::Letterbox => {
                let ratio = ratios.0.min(ratios.1);
                (side(ratio, from.0).min(to.0), side(ratio, from.1).min(to.1))
            }
        }
    }

    /// Whether pixels leave as they are, so that they may be rounded as soon as they have their last size.
    fn rounds_early(&self) -> bool {
        let unchanged = self.scale == 1.0 && self.mean == [0.0; 3] && self.std == [1.0; 3];
        unchanged && self.dtype == Output::U8 && self.order != Order::Gray
    }

    /// Bytes that [`apply`](Self::apply) holds at its peak beside the picture, the result included.
    pub fn working_bytes(&self, picture: &Picture) -> Result<u64> {
        let bytes = |size: (u32, u32), per_value: u64| u64::from(size.0) * u64::from(size.1) * 3 * per_value;
        let mut size = (picture.width, picture.height);
        // What lies in memory after each step; only neighbours exist together.
        let mut steps = vec![0];
        let mut step = |size: &mut (u32, u32), to: (u32, u32), per_value: u64| {
            if *size != to {
                steps.push(bytes(to, per_value));
            }
            *size = to;
        };
        let last = if self.rounds_early() { 1 } else { 4 };
        if let Some(short) = self.short {
            let to = scaled_short(size, short);
            step(&mut size, to, if self.resize.is_none() { last } else { 4 });
        }
        if let Some(to) = self.resize {
            let scaled = self.scaled(size, to);
            step(&mut size, scaled, last);
            step(&mut size, to, 4);
        }
        if let Some(to) = self.crop {
            step(&mut size, to, 4);
        }
        check_size("preprocessing", u64::from(size.0), u64::from(size.1))?;
        steps.push(bytes(size, if self.dtype == Output::U8 { 1 } else { 4 }));
        Ok(steps.windows(2).map(|pair| pair[0].saturating_add(pair[1])).max().unwrap_or(0))
    }

    /// Does all that is declared.
    pub fn apply(&self, picture: &Picture) -> Result<Prepared> {
        let (out_width, out_height) = self.output_size(picture.width, picture.height);
        check_size("preprocessing", u64::from(out_width), u64::from(out_height))?;
        let mut plane = Plane {
            width: picture.width as usize,
            height: picture.height as usize,
            values: Values::Bytes(Cow::Borrowed(&picture.rgb)),
        };
        let rounded = self.rounds_early();
        let mut scale = (1.0f32, 1.0f32);
        let mut offset = (0.0f32, 0.0f32);
        let mut rescale = |plane: &mut Plane,
                           width: u32,
                           height: u32,
                           offset: &mut (f32, f32),
                           rounded: bool|
         -> Result<()> {
            check_size("preprocessing", u64::from(width), u64::from(height))?;
            let factor = (width as f32 / plane.width as f32, height as f32 / plane.height as f32);
            scale = (scale.0 * factor.0, scale.1 * factor.1);
            *offset = (offset.0 * factor.0, offset.1 * factor.1);
            if (plane.width, plane.height) != (width as usize, height as usize) {
                *plane = resize(plane, width as usize, height as usize, self.filter, self.antialias, rounded);
            }
            Ok(())
        };
        if let Some(short) = self.short {
            let (width, height) = scaled_short((picture.width, picture.height), short);
            rescale(&mut plane, width, height, &mut offset, rounded && self.resize.is_none())?;
        }
        if let Some((width, height)) = self.resize {
            let (w, h) = self.scaled((plane.width as u32, plane.height as u32), (width, height));
            rescale(&mut plane, w, h, &mut offset, rounded)?;
            if self.fit != Fit::Stretch {
                recentre(&mut plane, width, height, self.pad, &mut offset);
            }
        }
        if let Some((width, height)) = self.crop {
            recentre(&mut plane, width, height, self.pad, &mut offset);
        }
        Ok(Prepared { tensor: self.pack(&plane)?, scale, offset })
    }

    fn pack(&self, plane: &Plane) -> Result<Tensor> {
        let (height, width) = (plane.height, plane.width);
        let pixels = height * width;
        let channel_count = if self.order == Order::Gray { 1 } else { 3 };
        let channels_last = matches!(self.layout, Layout::Nhwc | Layout::Hwc);
        let shape: &[usize] = match self.layout {
            Layout::Nchw => &[1, channel_count, height, width],
            Layout::Nhwc => &[1, height, width, channel_count],
            Layout::Chw => &[channel_count, height, width],
            Layout::Hwc => &[height, width, channel_count],
        };
        let mut row = vec![0f32; width * 3];
        let mut each = |put: &mut dyn FnMut(usize, f32)| {
            for y in 0..height {
                plane.copy_row(0, y, &mut row);
                for (x, pixel) in row.chunks_exact(3).enumerate() {
                    let index = y * width + x;
                    for c in 0..channel_count {
                        let v = match self.order {
                            Order::Rgb => pixel[c],
                            Order::Bgr => pixel[2 - c],
                            Order::Gray => 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2],
                        };
                        let at = if channels_last { index * channel_count + c } else { c * pixels + index };
                        put(at, (v / self.scale - self.mean[c]) / self.std[c]);
                    }
                }
            }
        };
        let dtype = match self.dtype {
            Output::F32 => DType::F32,
            Output::U8 => DType::U8,
        };
        let mut tensor = Tensor::zeros(dtype, shape);
        match self.dtype {
            Output::F32 => {
                let values = tensor.as_mut_slice::<f32>();
                each(&mut |at, v| values[at] = v);
            }
            Output::U8 => {
                let values = tensor.as_mut_slice::<u8>();
                each(&mut |at, v| values[at] = v.round_ties_even().clamp(0.0, 255.0) as u8);
            }
        }
        Ok(tensor)
    }
}

fn scaled_short((width, height): (u32, u32), short: u32) -> (u32, u32) {
    // The longer side is rounded down, as torchvision does it.
    let long =
        |a: u32, b: u32| u32::try_from(u64::from(short) * u64::from(a) / u64::from(b)).unwrap_or(u32::MAX);
    if width <= height { (short, long(height, width)) } else { (long(width, height), short) }
}

/// Cuts or fills a plane to a size, keeping the centre.
fn recentre(plane: &mut Plane, width: u32, height: u32, pad: f32, offset: &mut (f32, f32)) {
    let (width, height) = (width as usize, height as usize);
    // Positive where something is cut off, negative where something is filled in.
    let left = (plane.width as isize - width as isize).div_euclid(2);
    let top = (plane.height as isize - height as isize).div_euclid(2);
    offset.0 -= left as f32;
    offset.1 -= top as f32;
    if (plane.width, plane.height) == (width, height) {
        return;
    }
    let mut values = vec![pad; width * height * 3];
    let first = left.max(0) as usize;
    let into = (-left).max(0) as usize;
    let columns = (plane.width - first).min(width - into);
    for y in 0..height {
        let from = y as isize + top;
        if from < 0 || from >= plane.height as isize {
            continue;
        }
        let target = (y * width + into) * 3;
        plane.copy_row(first, from as usize, &mut values[target..target + columns * 3]);
    }
    *plane = Plane { width, height, values: Values::Floats(values) };
}

/// For each output position of one axis: the first input position and the weights from there on.
fn weights(from: usize, to: usize, filter: Filter, antialias: bool) -> Vec<(usize, Vec<f32>)> {
    let ratio = from as f64 / to as f64;
    let stretch = if antialias { ratio.max(1.0) } else { 1.0 };
    let radius = match filter {
        Filter::Nearest => 0.5,
        Filter::Bilinear => 1.0,
        Filter::Bicubic => 2.0,
    };
    let a = if antialias { -0.5 } else { -0.75 };
    let kernel = |x: f64| {
        let x = x.abs();
        match filter {
            Filter::Nearest => 1.0,
            Filter::Bilinear => (1.0 - x).max(0.0),
            Filter::Bicubic if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * a,
            Filter::Bicubic => 0.0,
        }
    };
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * ratio;
            if filter == Filter::Nearest {
                return ((centre as usize).min(from - 1), vec![1.0]);
            }
            if antialias {
                // Positions outside of the picture have no weight; the others are made to add up to one.
                let support = radius * stretch;
                let first = (centre - support + 0.5).max(0.0) as usize;
                let last = ((centre + support + 0.5) as usize).clamp(first + 1, from.max(first + 1));
                let raw: Vec<f64> =
                    (first..last).map(|j| kernel((j as f64 + 0.5 - centre) / stretch)).collect();
                let sum: f64 = raw.iter().sum();
                (first, raw.iter().map(|w| (w / sum) as f32).collect())
            } else {
                // Positions outside of the picture repeat its edge.
                let base = (centre - 0.5).floor();
                let reach = radius as i64;
                let mut first = from - 1;
                let mut taps = Vec::new();
                for j in base as i64 - reach + 1..=base as i64 + reach {
                    let at = j.clamp(0, from as i64 - 1) as usize;
                    first = first.min(at);
                    taps.push((at, kernel(j as f64 + 0.5 - centre)));
                }
                let last = taps.iter().map(|t| t.0).max().unwrap_or(first);
                let mut out = vec![0f32; last - first + 1];
                taps.iter().for_each(|(at, w)| out[at - first] += *w as f32);
                (first, out)
            }
        })
        .collect()
}

/// One axis of a row: each result is a weighted sum of neighbouring pixels.
fn resize_row(source: &[f32], taps: &[(usize, Vec<f32>)], out: &mut [f32]) {
    for ((first, taps), out) in taps.iter().zip(out.chunks_exact_mut(3)) {
        let mut sum = [0f32; 3];
        for (weight, pixel) in taps.iter().zip(source[first * 3..].chunks_exact(3)) {
            for c in 0..3 {
                sum[c] += weight * pixel[c];
            }
        }
        out.copy_from_slice(&sum);
    }
}

fn add_row(out: &mut [f32], weight: f32, row: &[f32]) {
    out.iter_mut().zip(row).for_each(|(out, v)| *out += weight * v);
}

/// The rows of a picture that is being made, from the top.
struct Rows {
    values: Values<'static>,
}

impl Rows {
    fn push(&mut self, row: &[f32]) {
        // Cubic filters overshoot; a pixel stays a pixel.
        let pixels = row.iter().map(|v| v.clamp(0.0, 255.0));
        match &mut self.values {
            Values::Bytes(bytes) => bytes.to_mut().extend(pixels.map(|v| v.round_ties_even() as u8)),
            Values::Floats(floats) => floats.extend(pixels),
        }
    }
}

/// Resizes row by row, so that nothing of the size of both pictures is ever in memory; to whole numbers if `rounded`.
fn resize(
    plane: &Plane,
    width: usize,
    height: usize,
    filter: Filter,
    antialias: bool,
    rounded: bool,
) -> Plane<'static> {
    let horizontal = weights(plane.width, width, filter, antialias);
    let vertical = weights(plane.height, height, filter, antialias);
    let mut source = vec![0f32; plane.width * 3];
    let size = width * height * 3;
    let values = if rounded {
        Values::Bytes(Cow::Owned(Vec::with_capacity(size)))
    } else {
        Values::Floats(Vec::with_capacity(size))
    };
    let mut rows = Rows { values };
    // Rows first, as everybody does it; only where that would take far longer (a tall picture made wide) columns first.
    // One of the two is always quick, because both pictures are limited.
    if plane.height * width <= 16 * (height * plane.width).max(1 << 20) {
        let mut narrowed = vec![0f32; width * 3];
        // First and last positions rise with the row of the result, so the rows that use a source row are neighbours:
        // those from `done` on that have begun.
        let mut done = 0;
        let mut begun: VecDeque<Vec<f32>> = VecDeque::new();
        for y in 0..plane.height {
            while done < height && vertical[done].0 + vertical[done].1.len() <= y {
                rows.push(&begun.pop_front().unwrap_or_else(|| vec![0f32; width * 3]));
                done += 1;
            }
            if done == height {
                break;
            }
            if vertical[done].0 > y {
                continue;
            }
            plane.copy_row(0, y, &mut source);
            resize_row(&source, &horizontal, &mut narrowed);
            let open = vertical[done..].iter().take_while(|v| v.0 <= y);
            for (index, (first, taps)) in open.enumerate() {
                if begun.len() <= index {
                    begun.push_back(vec![0f32; width * 3]);
                }
                let Some(weight) = taps.get(y - first) else { continue };
                add_row(&mut begun[index], *weight, &narrowed);
            }
        }
        for _ in done..height {
            rows.push(&begun.pop_front().unwrap_or_else(|| vec![0f32; width * 3]));
        }
    } else {
        let mut column_sums = vec![0f32; plane.width * 3];
        let mut out = vec![0f32; width * 3];
        for (first, taps) in &vertical {
            column_sums.fill(0.0);
            for (step, weight) in taps.iter().enumerate() {
                plane.copy_row(0, first + step, &mut source);
                add_row(&mut column_sums, *weight, &source);
            }
            resize_row(&column_sums, &horizontal, &mut out);
            rows.push(&out);
        }
    }
    Plane { width, height, values: rows.values }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gradient(width: u32, height: u32) -> Picture {
        let rgb = (0..height)
            .flat_map(|y| {
                (0..width)
                    .flat_map(move |x| [(x * 7 % 256) as u8, (y * 11 % 256) as u8, ((x + y) % 256) as u8])
            })
            .collect();
        Picture::from_rgb(width, height, rgb).unwrap()
    }

    fn encode(format: ::image::ImageFormat) -> Vec<u8> {
        let picture = gradient(20, 10);
        let buffer = ::image::RgbImage::from_raw(20, 10, picture.rgb).unwrap();
        let mut out = Cursor::new(Vec::new());
        buffer.write_to(&mut out, format).unwrap();
        out.into_inner()
    }

    #[test]
    fn lossless_formats_decode_to_the_same_pixels() {
        use ::image::ImageFormat::{Bmp, Png, WebP};
        for format in [Png, Bmp, WebP] {
            assert_eq!(Picture::decode(&encode(format)).unwrap(), gradient(20, 10), "{format:?}");
        }
        let jpeg = Picture::decode(&encode(::image::ImageFormat::Jpeg)).unwrap();
        assert_eq!((jpeg.width(), jpeg.height()), (20, 10));
        assert_eq!(Picture::decoding_bytes(&encode(::image::ImageFormat::Jpeg)).unwrap(), 600);
    }

    #[test]
    fn a_truncated_picture_is_corrupt() {
        let bytes = encode(::image::ImageFormat::Png);
        let error = Picture::decode(&bytes[..bytes.len() / 2]).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(matches!(Picture::decode(b"plain text"), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_picture_bomb_is_refused_by_its_header() {
        // A PNG header that claims 60,000 by 60,000 pixels.
        let mut png = encode(::image::ImageFormat::Png);
        png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        let crc = crc32(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = Picture::decode(&png).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
        assert!(matches!(Picture::decoding_bytes(&png), Err(Error::Limit { .. })));
        assert!(matches!(Picture::decoding_bytes(b"plain text"), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_progressive_jpeg_is_told_by_its_frame_header() {
        let baseline = encode(::image::ImageFormat::Jpeg);
        assert!(!is_progressive_jpeg(&baseline));
        let mut progressive = baseline.clone();
        let frame = progressive.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
        progressive[frame + 1] = 0xc2;
        assert!(is_progressive_jpeg(&progressive));
        for end in 0..40 {
            assert!(!is_progressive_jpeg(&progressive[..end.min(frame)]), "cut at {end}");
        }
        assert!(!is_progressive_jpeg(&[0xff, 0xd8, 0xff, 0xe0, 0, 0, 0xff, 0xe0, 0, 0]));
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, b| {
            (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
        })
    }

    #[test]
    fn normalisation_and_orders() {
        let picture = Picture::from_rgb(1, 1, vec![255, 128, 0]).unwrap();
        let check = |how: &str, expected: &[f32]| {
            let tensor = how.parse::<Preprocess>().unwrap().apply(&picture).unwrap().tensor;
            assert_eq!(tensor.as_slice::<f32>(), expected, "{how}");
        };
        check("layout=nchw", &[255.0, 128.0, 0.0]);
        check("order=bgr", &[0.0, 128.0, 255.0]);
        check("scale=255,mean=0.5,std=0.5", &[1.0, (128.0 / 255.0 - 0.5) / 0.5, -1.0]);
        check("mean=1:2:3,order=bgr", &[-1.0, 126.0, 252.0]);
    }

    #[test]
    fn a_2_to_1_shrink_is_an_average_with_antialias() {
        let picture = Picture::from_rgb(4, 1, [[0u8; 3], [100; 3], [100; 3], [200; 3]].concat()).unwrap();
        let how: Preprocess = "resize=2x1,order=gray,antialias=on".parse().unwrap();
        let tensor = how.apply(&picture).unwrap().tensor;
        let values = tensor.as_slice::<f32>();
        // Weights 3/8, 3/8, 1/8 of the triangle filter, made to add up to one.
        let expected = (3.0 * 0.0 + 3.0 * 100.0 + 100.0) / 7.0;
        assert!((values[0] - expected).abs() < 1e-3, "{values:?}");
        let how: Preprocess = "resize=2x1,order=gray,antialias=off".parse().unwrap();
        let tensor = how.apply(&picture).unwrap().tensor;
        let values = tensor.as_slice::<f32>();
        assert!((values[0] - 50.0).abs() < 1e-3 && (values[1] - 150.0).abs() < 1e-3, "{values:?}");
    }

    #[test]
    fn a_tall_picture_made_wide_needs_neither_memory_nor_time() {
        // In between, 60,000 x 60,000 pixels would be needed if the rows were done first.
        let picture = Picture::from_rgb(1, 60_000, vec![9; 180_000]).unwrap();
        let how: Preprocess = "resize=60000x1,order=gray".parse().unwrap();
        let tensor = how.apply(&picture).unwrap().tensor;
        assert_eq!(tensor.dims(), [1, 1, 1, 60_000]);
        assert!(tensor.as_slice::<f32>().iter().all(|v| (v - 9.0).abs() < 1e-3));
    }

    #[test]
    fn letterbox_and_cover_keep_the_centre() {
        let picture = gradient(40, 20);
        let how: Preprocess = "resize=20,fit=letterbox,pad=7,layout=hwc".parse().unwrap();
        let prepared = how.apply(&picture).unwrap();
        let values = prepared.tensor.as_slice::<f32>();
        assert_eq!(prepared.tensor.dims(), [20, 20, 3]);
        assert!(values[..5 * 60].iter().all(|v| *v == 7.0) && values[15 * 60..].iter().all(|v| *v == 7.0));
        assert_eq!((prepared.scale, prepared.offset), ((0.5, 0.5), (0.0, 5.0)));
        assert_eq!(prepared.to_original(20.0, 15.0), (40.0, 20.0));
        let how: Preprocess = "resize=20,fit=cover".parse().unwrap();
        assert_eq!(how.apply(&picture).unwrap().offset, (-10.0, 0.0));
    }

    #[test]
    fn short_and_crop() {
        let how: Preprocess = "short=10,crop=8,dtype=u8,layout=nhwc".parse().unwrap();
        let prepared = how.apply(&gradient(40, 20)).unwrap();
        assert_eq!(prepared.tensor.dims(), [1, 8, 8, 3]);
        assert_eq!(prepared.offset, (-6.0, -1.0));
    }

    #[test]
    fn bad_texts_say_what_was_expected() {
        for text in [
            "resize",
            "resize=0",
            "resize=1x",
            "mean=a",
            "std=0",
            "fit=tall",
            "x=1",
            "scale=nan",
            "pad=1,pad=2",
        ] {
            let error = text.parse::<Preprocess>().unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{text}: {error}");
        }
        assert!("resize=60000".parse::<Preprocess>().is_err());
    }

    proptest! {
        #[test]
        fn a_constant_picture_stays_constant(w in 1u32..40, h in 1u32..40, ow in 1u32..40, oh in 1u32..40, v: u8,
            filter in prop::sample::select(vec!["nearest", "bilinear", "bicubic"]), anti: bool) {
            let picture = Picture::from_rgb(w, h, vec![v; (w * h * 3) as usize]).unwrap();
            let anti = if anti { "on" } else { "off" };
            let how: Preprocess = format!("resize={ow}x{oh},filter={filter},antialias={anti}").parse().unwrap();
            let tensor = how.apply(&picture).unwrap().tensor;
            let values = tensor.as_slice::<f32>();
            prop_assert!(values.iter().all(|x| (x - f32::from(v)).abs() < 1e-2), "{:?}", values);
        }

        #[test]
        fn texts_round_trip(text in "(short=[1-9],)?(resize=[1-9]x[1-9],)?(fit=cover,)?(mean=[0-9]:1:2,)?(dtype=u8)?") {
            let how: Preprocess = text.parse().unwrap();
            prop_assert_eq!(how.to_string().parse::<Preprocess>().unwrap(), how);
        }
    }
}
