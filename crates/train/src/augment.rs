//! Random changes of pictures and mixtures of samples.

use std::fmt;
use std::str::FromStr;

use lightering_graph::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::schedule::Settings;
use crate::{Feature, Random, TrainError};

/// Random changes of one picture, `[channels, height, width]`, 0 to 1, in the order of the fields.
///
/// Written as `flip`, `crop=4` (pixels of padding), `rotate=15` (degrees), `jitter=0.2` (or `brightness`, `contrast`,
/// `saturation` alone), `cutout=8` (pixels), joined by commas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Augmentation {
    /// Mirrors left and right, every second picture.
    pub flip: bool,
    /// Moves by up to so many pixels; what comes in is black.
    pub crop: usize,
    /// Turns by up to so many degrees around the centre, bilinear; what comes in is black.
    pub rotate: f32,
    /// Multiplies by `1 ± brightness`.
    pub brightness: f32,
    /// Moves away from or to the mean grey by `1 ± contrast`.
    pub contrast: f32,
    /// Moves away from or to each pixel's grey by `1 ± saturation`; colour only.
    pub saturation: f32,
    /// Blackens a square of so many pixels (DeVries and Taylor, 2017).
    pub cutout: usize,
}

/// ITU-R 601.
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

impl Augmentation {
    /// Fails when the first feature is no picture.
    pub(crate) fn check(&self, features: &[Feature]) -> Result<(), TrainError> {
        match features.first() {
            Some(f) if f.dtype == DType::F32 && f.dims.len() == 3 => Ok(()),
            Some(f) => Err(TrainError::invalid(
                "augmentation",
                format!("{} is {}{:?}", f.name, f.dtype, f.dims),
                "pictures [channels, height, width]",
            )),
            None => Err(TrainError::invalid("augmentation", "samples without features", "pictures")),
        }
    }

    /// Changes one picture. `scratch` is reused from call to call.
    ///
    /// # Panics
    /// When `dims` is not `[channels, height, width]` of `image`.
    pub fn apply(&self, image: &mut [f32], dims: &[usize], random: &mut Random, scratch: &mut Vec<f32>) {
        let &[channels, height, width] = dims else { panic!("a picture has three dimensions") };
        assert_eq!(image.len(), channels * height * width, "the shape is that of the picture");
        if image.is_empty() {
            return;
        }
        // All draws are made whether they are needed or not, so that one option does not change what another draws.
        let flip = random.chance(0.5);
        let shift = |random: &mut Random| random.below(2 * self.crop + 1) as isize - self.crop as isize;
        let (down, right) = (shift(random), shift(random));
        let angle = random.between(-1.0, 1.0) * f64::from(self.rotate);
        let factor = |random: &mut Random, by: f32| (1.0 + random.between(-1.0, 1.0) * f64::from(by)) as f32;
        let brightness = factor(random, self.brightness);
        let contrast = factor(random, self.contrast);
        let saturation = factor(random, self.saturation);
        let hole = (random.below(height), random.below(width));

        if self.flip && flip {
            image.chunks_exact_mut(width).for_each(<[f32]>::reverse);
        }
        if (down, right) != (0, 0) {
            for plane in image.chunks_exact_mut(height * width) {
                scratch.clear();
                scratch.extend_from_slice(plane);
                for y in 0..height {
                    for x in 0..width {
                        let (sy, sx) = (y.wrapping_add_signed(-down), x.wrapping_add_signed(-right));
                        let inside = sy < height && sx < width;
                        plane[y * width + x] = if inside { scratch[sy * width + sx] } else { 0.0 };
                    }
                }
            }
        }
        if self.rotate > 0.0 {
            turn(image, height, width, angle.to_radians(), scratch);
        }
        if self.brightness > 0.0 {
            image.iter_mut().for_each(|v| *v = (*v * brightness).clamp(0.0, 1.0));
        }
        let plane = height * width;
        let luma = |image: &[f32], i: usize| match channels {
            3 => (0..3).map(|c| LUMA[c] * image[c * plane + i]).sum(),
            _ => image[i],
        };
        if self.contrast > 0.0 {
            let grey = (0..plane).map(|i| luma(image, i)).sum::<f32>() / plane as f32;
            image.iter_mut().for_each(|v| *v = (grey + (*v - grey) * contrast).clamp(0.0, 1.0));
        }
        if self.saturation > 0.0 && channels == 3 {
            for i in 0..plane {
                let grey = luma(image, i);
                for c in 0..3 {
                    let v = &mut image[c * plane + i];
                    *v = (grey + (*v - grey) * saturation).clamp(0.0, 1.0);
                }
            }
        }
        if self.cutout > 0 {
            let span = |centre: usize, len: usize| {
                let from = centre.saturating_sub(self.cutout / 2);
                from..(centre + self.cutout.div_ceil(2)).min(len)
            };
            for plane in image.chunks_exact_mut(plane) {
                for y in span(hole.0, height) {
                    plane[y * width..][span(hole.1, width)].fill(0.0);
                }
            }
        }
    }
}

fn turn(image: &mut [f32], height: usize, width: usize, angle: f64, scratch: &mut Vec<f32>) {
    let (sin, cos) = (libm::sin(angle) as f32, libm::cos(angle) as f32);
    let (cy, cx) = ((height as f32 - 1.0) / 2.0, (width as f32 - 1.0) / 2.0);
    for plane in image.chunks_exact_mut(height * width) {
        scratch.clear();
        scratch.extend_from_slice(plane);
        let at = |y: f32, x: f32| {
            let inside = y >= 0.0 && x >= 0.0 && y < height as f32 && x < width as f32;
            if inside { scratch[y as usize * width + x as usize] } else { 0.0 }
        };
        for y in 0..height {
            for x in 0..width {
                let (dy, dx) = (y as f32 - cy, x as f32 - cx);
                let (sy, sx) = (cy + cos * dy - sin * dx, cx + sin * dy + cos * dx);
                let (y0, x0) = (sy.floor(), sx.floor());
                let (fy, fx) = (sy - y0, sx - x0);
                plane[y * width + x] = (1.0 - fy) * ((1.0 - fx) * at(y0, x0) + fx * at(y0, x0 + 1.0))
                    + fy * ((1.0 - fx) * at(y0 + 1.0, x0) + fx * at(y0 + 1.0, x0 + 1.0));
            }
        }
    }
}

impl FromStr for Augmentation {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Augmentation, TrainError> {
        const PLACE: &str = "augmentation";
        let flip = text.split(',').any(|p| p.trim() == "flip");
        let rest: Vec<&str> = text.split(',').filter(|p| p.trim() != "flip").collect();
        let rest = rest.join(",");
        let mut s = Settings::parse(PLACE, &rest)?;
        let jitter = s.number("jitter", 0.0, 0.0..=1.0)?;
        let out = Augmentation {
            flip,
            crop: s.count("crop")?.unwrap_or(0) as usize,
            rotate: s.number("rotate", 0.0, 0.0..=180.0)?,
            brightness: s.number("brightness", jitter, 0.0..=1.0)?,
            contrast: s.number("contrast", jitter, 0.0..=1.0)?,
            saturation: s.number("saturation", jitter, 0.0..=1.0)?,
            cutout: s.count("cutout")?.unwrap_or(0) as usize,
        };
        if out.crop.max(out.cutout) > 65_536 {
            return Err(TrainError::invalid(PLACE, text, "at most 65536 pixels"));
        }
        s.finish("flip, crop, rotate, jitter, brightness, contrast, saturation or cutout")?;
        Ok(out)
    }
}

impl fmt::Display for Augmentation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = [
            ("crop", self.crop as f32),
            ("rotate", self.rotate),
            ("brightness", self.brightness),
            ("contrast", self.contrast),
            ("saturation", self.saturation),
            ("cutout", self.cutout as f32),
        ];
        let flip = self.flip.then(|| "flip".to_owned());
        let numbers = numbers.iter().filter(|(_, v)| *v > 0.0).map(|(k, v)| format!("{k}={v}"));
        f.write_str(&flip.into_iter().chain(numbers).collect::<Vec<_>>().join(","))
    }
}

/// Mixtures of the samples of a batch: sample `i` with sample `n - 1 - i`. Labels become probabilities.
///
/// Written as `mixup:0.2`, `cutmix:1.0`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixing {
    /// `λ·a + (1 - λ)·b` with λ of Beta(alpha, alpha) (Zhang et al., 2018).
    Mixup(f64),
    /// A rectangle of one picture in the other; its share of the area decides the labels (Yun et al., 2019).
    Cutmix(f64),
}

impl Mixing {
    pub(crate) fn check(&self, features: &[Feature], classes: &[String]) -> Result<(), TrainError> {
        let [first, .., label] = features else {
            return Err(TrainError::invalid("mixing", "samples without labels", "an input and a class"));
        };
        let fits = match self {
            Mixing::Mixup(_) => first.dtype == DType::F32,
            Mixing::Cutmix(_) => first.dtype == DType::F32 && first.dims.len() == 3,
        };
        if !fits || features.len() != 2 {
            return Err(TrainError::invalid(
                "mixing",
                format!("{} is {}{:?}", first.name, first.dtype, first.dims),
                "one input of numbers (cutmix: of pictures)",
            ));
        }
        if label.dtype != DType::I64 || !label.dims.is_empty() || classes.is_empty() {
            return Err(TrainError::invalid("mixing", "labels that are no classes", "one class per sample"));
        }
        Ok(())
    }

    pub(crate) fn apply(&self, input: &mut Tensor, label: &mut Tensor, samples: usize, random: &mut Random) {
        let dims = input.dims().to_vec();
        let size: usize = dims[1..].iter().product();
        let classes = label.dims()[1];
        let pairs = samples / 2;
        let lambda = match *self {
            Mixing::Mixup(alpha) => {
                let lambda = random.beta(alpha) as f32;
                each_pair(input.as_mut_slice(), size, samples, pairs, &mut |a, b| blend(a, b, lambda));
                lambda
            }
            Mixing::Cutmix(alpha) => {
                let (height, width) = (dims[2], dims[3]);
                let side = (1.0 - random.beta(alpha)).sqrt();
                let (cy, cx) = (random.below(height), random.below(width));
                let span = |centre: usize, len: usize| {
                    let half = (len as f64 * side / 2.0) as usize;
                    centre.saturating_sub(half)..(centre + half).min(len)
                };
                let (rows, columns) = (span(cy, height), span(cx, width));
                each_pair(input.as_mut_slice::<f32>(), size, samples, pairs, &mut |a, b| {
                    for (a, b) in a.chunks_exact_mut(height * width).zip(b.chunks_exact_mut(height * width)) {
                        for y in rows.clone() {
                            let line = y * width + columns.start..y * width + columns.end;
                            a[line.clone()].swap_with_slice(&mut b[line]);
                        }
                    }
                });
                1.0 - (rows.len() * columns.len()) as f32 / (height * width) as f32
            }
        };
        each_pair(label.as_mut_slice(), classes, samples, pairs, &mut |a, b| blend(a, b, lambda));
    }
}

fn each_pair(
    values: &mut [f32],
    size: usize,
    samples: usize,
    pairs: usize,
    change: &mut dyn FnMut(&mut [f32], &mut [f32]),
) {
    for i in 0..pairs {
        let j = samples - 1 - i;
        let (head, tail) = values.split_at_mut(j * size);
        change(&mut head[i * size..(i + 1) * size], &mut tail[..size]);
    }
}

fn blend(a: &mut [f32], b: &mut [f32], lambda: f32) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (lambda * *a + (1.0 - lambda) * *b, lambda * *b + (1.0 - lambda) * *a);
    }
}

impl FromStr for Mixing {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Mixing, TrainError> {
        let bad =
            || TrainError::invalid("mixing", format!("{text:?}"), "mixup:ALPHA or cutmix:ALPHA, above 0");
        let (name, alpha) = text.split_once(':').unwrap_or((text, "1"));
        let alpha = alpha.parse::<f64>().ok().filter(|a| *a > 0.0 && *a <= 100.0).ok_or_else(bad)?;
        match name {
            "mixup" => Ok(Mixing::Mixup(alpha)),
            "cutmix" => Ok(Mixing::Cutmix(alpha)),
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(text: &str, seed: u64) -> Vec<f32> {
        let augmentation: Augmentation = text.parse().unwrap();
        assert_eq!(augmentation.to_string().parse::<Augmentation>().unwrap(), augmentation);
        let mut image: Vec<f32> = (0..3 * 16).map(|i| i as f32 / 48.0).collect();
        augmentation.apply(&mut image, &[3, 4, 4], &mut Random::new(seed), &mut Vec::new());
        image
    }

    #[test]
    fn flips_and_moves() {
        let plain = changed("", 0);
        let flipped = (0..10).map(|s| changed("flip", s)).find(|i| *i != plain).unwrap();
        assert_eq!((flipped[0], flipped[3], flipped[4]), (plain[3], plain[0], plain[7]));
        let mut moved = 0;
        for seed in 0..20 {
            let image = changed("crop=1", seed);
            // The pixel (1, 1) went to one of its neighbours.
            let found = [0usize, 1, 2].iter().any(|y| {
                [0usize, 1, 2]
                    .iter()
                    .any(|x| image[y * 4 + x] == plain[5] && image[16 + y * 4 + x] == plain[21])
            });
            assert!(found);
            moved += usize::from(image != plain);
        }
        assert!(moved > 10);
        assert_eq!(changed("crop=1", 3), changed("crop=1", 3));
    }

    #[test]
    fn a_quarter_turn_is_exact() {
        let mut image: Vec<f32> = (0..9).map(|i| i as f32).collect();
        turn(&mut image, 3, 3, std::f64::consts::FRAC_PI_2, &mut Vec::new());
        let turned: Vec<i32> = image.iter().map(|v| v.round() as i32).collect();
        assert_eq!(turned, [6, 3, 0, 7, 4, 1, 8, 5, 2], "clockwise");
    }

    #[test]
    fn colours_stay_in_range_and_holes_are_black() {
        for seed in 0..20 {
            assert!(changed("jitter=0.9,rotate=40", seed).iter().all(|v| (0.0..=1.0).contains(v)));
            let black = changed("cutout=2", seed).iter().filter(|v| **v == 0.0).count();
            assert!((3..=13).contains(&black), "{black}");
        }
        assert!("crop=-1".parse::<Augmentation>().is_err());
        assert!("flop".parse::<Augmentation>().is_err());
        assert!("mixup:0".parse::<Mixing>().is_err());
    }

    #[test]
    fn mixtures_keep_sums() {
        for mixing in [Mixing::Mixup(0.4), Mixing::Cutmix(1.0)] {
            let values: Vec<f32> = (0..5).flat_map(|i| [i as f32; 16]).collect();
            let mut input = Tensor::from_slice(&[5, 1, 4, 4], &values);
            let mut label = Tensor::zeros(DType::F32, &[5, 5]);
            (0..5).for_each(|i| label.as_mut_slice::<f32>()[i * 6] = 1.0);
            mixing.apply(&mut input, &mut label, 5, &mut Random::new(4));
            let labels = label.as_slice::<f32>();
            for i in 0..5 {
                let mean = input.as_slice::<f32>()[i * 16..(i + 1) * 16].iter().sum::<f32>() / 16.0;
                let expected: f32 = (0..5).map(|c| labels[i * 5 + c] * c as f32).sum();
                assert!((mean - expected).abs() < 1e-5, "{mixing:?} {mean} {expected}");
                assert!((labels[i * 5..i * 5 + 5].iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
            assert_eq!(labels[12], 1.0, "the middle one has no partner");
        }
    }
}
