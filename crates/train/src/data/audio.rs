//! Sounds in folders, as logarithmic mel spectrograms.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use lightering_graph::DType;
use lightering_kernels::ops::fourier::{
    Complex, FourierPlan, WindowShape, fourier_buffer_len, fourier_table_len, mel_weights, window_value,
};

use super::image_folder::{entries, name_of, subfolders};
use super::{Dataset, Feature, LABEL, put};
use crate::{Random, TrainError};

/// Endings of files that are taken for sounds.
const ENDINGS: [&str; 3] = ["wav", "flac", "ogg"];
/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Most samples of one channel that are decoded.
const MAX_SAMPLES: usize = 1 << 26;
/// Up to this share of the files may be broken.
const BROKEN_PERCENT: usize = 5;
/// Added to energies before the logarithm.
const FLOOR: f64 = 1e-6;

/// One channel, -1 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Sound {
    /// Samples a second.
    pub rate: u32,
    /// The mean of the channels.
    pub samples: Vec<f32>,
}

impl Sound {
    /// Decodes WAV, FLAC or Ogg Vorbis, whichever the bytes are.
    ///
    /// # Errors
    /// They are none of these, damaged, or too long.
    pub fn decode(bytes: &[u8]) -> Result<Sound, TrainError> {
        let wrong = |e: &dyn std::fmt::Display| TrainError::corrupt("sound", e);
        let mut samples: Vec<f32> = Vec::new();
        let (rate, channels);
        let mut add = |value: f32| {
            samples.push(value);
            if samples.len() > 8 * MAX_SAMPLES {
                return Err(TrainError::limit(
                    "sound",
                    "samples",
                    samples.len() as u64,
                    8 * MAX_SAMPLES as u64,
                ));
            }
            Ok(())
        };
        if bytes.starts_with(b"RIFF") {
            let mut reader = hound::WavReader::new(Cursor::new(bytes)).map_err(|e| wrong(&e))?;
            let spec = reader.spec();
            (rate, channels) = (spec.sample_rate, usize::from(spec.channels));
            match spec.sample_format {
                hound::SampleFormat::Float => {
                    for value in reader.samples::<f32>() {
                        add(value.map_err(|e| wrong(&e))?)?;
                    }
                }
                hound::SampleFormat::Int => {
                    let full = (1u64 << (spec.bits_per_sample.clamp(1, 32) - 1)) as f32;
                    for value in reader.samples::<i32>() {
                        add(value.map_err(|e| wrong(&e))? as f32 / full)?;
                    }
                }
            }
        } else if bytes.starts_with(b"fLaC") {
            let mut reader = claxon::FlacReader::new(Cursor::new(bytes)).map_err(|e| wrong(&e))?;
            let info = reader.streaminfo();
            (rate, channels) = (info.sample_rate, info.channels as usize);
            let full = (1u64 << (info.bits_per_sample.clamp(1, 32) - 1)) as f32;
            for value in reader.samples() {
                add(value.map_err(|e| wrong(&e))? as f32 / full)?;
            }
        } else if bytes.starts_with(b"OggS") {
            let mut reader =
                lewton::inside_ogg::OggStreamReader::new(Cursor::new(bytes)).map_err(|e| wrong(&e))?;
            rate = reader.ident_hdr.audio_sample_rate;
            channels = usize::from(reader.ident_hdr.audio_channels);
            while let Some(packet) = reader.read_dec_packet_itl().map_err(|e| wrong(&e))? {
                for value in packet {
                    add(f32::from(value) / 32768.0)?;
                }
            }
        } else {
            return Err(TrainError::invalid("sound", "an unknown format", "WAV, FLAC or Ogg Vorbis"));
        }
        if channels == 0 || rate == 0 {
            return Err(TrainError::corrupt("sound", format!("{channels} channels of {rate} Hz")));
        }
        if channels > 1 {
            let frames = samples.len() / channels;
            for i in 0..frames {
                let sum: f32 = samples[i * channels..(i + 1) * channels].iter().sum();
                samples[i] = sum / channels as f32;
            }
            samples.truncate(frames);
        }
        Ok(Sound { rate, samples })
    }
}

/// Logarithmic mel spectrograms: Hann windows of 25 ms every 10 ms, power spectrum, triangular filters.
pub struct MelSpectrogram {
    window: Vec<f64>,
    hop: usize,
    /// For each band, the first bin and the weights from there on.
    filters: Vec<(usize, Vec<f64>)>,
    transform: usize,
}

impl MelSpectrogram {
    /// Of `bands` bands for sounds of `rate` samples a second.
    ///
    /// # Errors
    /// The rate is too low for so many bands.
    pub fn new(rate: u32, bands: usize) -> Result<MelSpectrogram, TrainError> {
        let size = (rate as usize / 40).max(1);
        let transform = size.next_power_of_two().max(256);
        let mut dense = vec![vec![0.0; transform / 2 + 1]; bands];
        let fits = bands > 0
            && mel_weights(
                bands,
                transform,
                f64::from(rate),
                (20.0, f64::from(rate) / 2.0),
                |row, band, w| {
                    if let Some(cell) = dense[band].get_mut(row) {
                        *cell = w;
                    }
                },
            );
        if !fits {
            return Err(TrainError::invalid(
                "spectrogram",
                format!("{bands} bands of {rate} Hz"),
                "fewer bands, at least one",
            ));
        }
        let filters = dense
            .into_iter()
            .map(|row| {
                let first = row.iter().position(|w| *w != 0.0).unwrap_or(0);
                let last = row.iter().rposition(|w| *w != 0.0).map_or(first, |l| l + 1);
                (first, row[first..last].to_vec())
            })
            .collect();
        let window = (0..size).map(|n| window_value(WindowShape::Hann, n, size, true)).collect();
        Ok(MelSpectrogram { window, hop: (rate as usize / 100).max(1), filters, transform })
    }

    /// Frames of a sound of so many samples: one for each hop that has begun.
    pub fn frames(&self, samples: usize) -> usize {
        samples.div_ceil(self.hop).max(1)
    }

    /// Writes `[bands, frames]` natural logarithms of energies; what is not there of the sound is silence.
    ///
    /// # Panics
    /// When `out` is no whole number of frames.
    pub fn write(&self, samples: &[f32], out: &mut [f32]) {
        let n = self.transform;
        let frames = out.len() / self.filters.len();
        assert_eq!(out.len(), frames * self.filters.len(), "every band has as many frames");
        let mut table = vec![Complex::default(); fourier_table_len(n)];
        let mut buffer = vec![Complex::default(); fourier_buffer_len(n)];
        let plan = FourierPlan::new(n, &mut table, &mut buffer);
        let mut data = vec![Complex::default(); n];
        for frame in 0..frames {
            data.fill(Complex::default());
            let rest = samples.get(frame * self.hop..).unwrap_or_default();
            for ((d, x), w) in data.iter_mut().zip(rest).zip(&self.window) {
                d.re = f64::from(*x) * w;
            }
            plan.run(&mut data, &mut buffer, false);
            for (band, (first, weights)) in self.filters.iter().enumerate() {
                let energy: f64 =
                    data[*first..].iter().zip(weights).map(|(c, w)| w * (c.re * c.re + c.im * c.im)).sum();
                out[band * frames + frame] = libm::log(energy + FLOOR) as f32;
            }
        }
    }
}

/// Sounds of one rate, `spectrogram` `f32` `[1, bands, frames]`, and the class that their folder (or, in one folder, the
/// part of their name before the first `_`) stands for.
pub struct SoundFolder {
    root: PathBuf,
    files: Vec<(PathBuf, u32)>,
    classes: Vec<String>,
    features: Vec<Feature>,
    rate: u32,
    mel: MelSpectrogram,
    broken: Vec<String>,
}

pub(super) fn is_sound(path: &Path) -> bool {
    path.extension().is_some_and(|e| ENDINGS.iter().any(|x| e.eq_ignore_ascii_case(x)))
}

fn decode_file(path: &Path) -> Result<Sound, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > MAX_FILE_BYTES {
        return Err(format!("{size} bytes, more than the {MAX_FILE_BYTES} that are read"));
    }
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    Sound::decode(&bytes).map_err(|e| e.to_string())
}

impl SoundFolder {
    /// The sounds in the folders of `root`, or in `root` itself. Longer ones than `seconds` are cut, shorter ones are
    /// followed by silence. Every file is decoded once, so that broken ones are known.
    ///
    /// # Errors
    /// A class has no sound, the rates differ, or more than 5 % are broken.
    pub fn open(root: &Path, bands: usize, seconds: f32) -> Result<SoundFolder, TrainError> {
        let place = root.display().to_string();
        let mut named: Vec<(PathBuf, String)> = Vec::new();
        for path in entries(root)?.into_iter().filter(|p| p.is_file() && is_sound(p)) {
            let name = name_of(&path);
            let class = name.split(['_', '.']).next().unwrap_or_default().to_owned();
            named.push((path, class));
        }
        if named.is_empty() {
            for folder in subfolders(root)? {
                let sounds: Vec<PathBuf> = entries(&folder)?.into_iter().filter(|p| is_sound(p)).collect();
                if sounds.is_empty() {
                    return Err(TrainError::invalid(
                        place,
                        format!("class without sounds: {}", name_of(&folder)),
                        "at least one WAV, FLAC or Ogg Vorbis file in each folder",
                    ));
                }
                named.extend(sounds.into_iter().map(|s| (s, name_of(&folder))));
            }
        }
        let mut classes: Vec<String> = named.iter().map(|(_, c)| c.clone()).collect();
        classes.sort();
        classes.dedup();
        let total = named.len();
        let (mut files, mut broken, mut rate) = (Vec::new(), Vec::new(), None);
        for (path, class) in named {
            match decode_file(&path) {
                Ok(sound) if *rate.get_or_insert(sound.rate) != sound.rate => {
                    return Err(TrainError::invalid(
                        path.display(),
                        format!("{} Hz, and others have {} Hz", sound.rate, rate.unwrap_or(0)),
                        "one rate; convert the others",
                    ));
                }
                Ok(_) => {
                    let label = classes.binary_search(&class).expect("every class is listed");
                    files.push((path, label as u32));
                }
                Err(reason) => broken.push(format!("{}: {reason}", path.display())),
            }
        }
        if broken.len() > 1 && broken.len() * 100 > total * BROKEN_PERCENT {
            return Err(TrainError::Broken {
                place,
                broken: broken.len(),
                total,
                allowed_percent: BROKEN_PERCENT as u32,
                first: broken.into_iter().take(3).collect(),
            });
        }
        let Some(rate) = rate else {
            return Err(TrainError::invalid(place, "no sounds", "WAV, FLAC or Ogg Vorbis files"));
        };
        if !(seconds > 0.0 && seconds <= 3600.0) {
            return Err(TrainError::invalid(
                "spectrogram",
                format!("{seconds} seconds"),
                "above 0, up to 3600",
            ));
        }
        let mel = MelSpectrogram::new(rate, bands)?;
        let frames = mel.frames((f64::from(rate) * f64::from(seconds)) as usize);
        let spectrogram = Feature::new("spectrogram", DType::F32, &[1, bands, frames]);
        let features = vec![spectrogram, Feature::new(LABEL, DType::I64, &[])];
        Ok(SoundFolder { root: root.to_owned(), files, classes, features, rate, mel, broken })
    }

    /// Samples a second of all sounds.
    pub fn rate(&self) -> u32 {
        self.rate
    }
}

impl Dataset for SoundFolder {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, _: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        let [spectrogram, label] = targets else { panic!("a sound has two features") };
        let (path, class) = &self.files[index];
        let sound = decode_file(path).map_err(|e| TrainError::corrupt(path.display(), e))?;
        self.mel.write(&sound.samples, bytemuck::cast_slice_mut(spectrogram));
        put(label, i64::from(*class));
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        let path = &self.files[index].0;
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }

    fn quarantined(&self) -> Vec<String> {
        self.broken.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wav(rate: u32, channels: u16, samples: &[i16]) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        let spec = hound::WavSpec {
            channels,
            sample_rate: rate,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        let mut writer = hound::WavWriter::new(&mut out, spec).unwrap();
        samples.iter().for_each(|s| writer.write_sample(*s).unwrap());
        writer.finalize().unwrap();
        out.into_inner()
    }

    fn tone(rate: u32, hz: f64, len: usize) -> Vec<i16> {
        (0..len)
            .map(|i| ((std::f64::consts::TAU * hz * i as f64 / f64::from(rate)).sin() * 16384.0) as i16)
            .collect()
    }

    #[test]
    fn sounds_are_decoded_to_one_channel() {
        let sound = Sound::decode(&wav(8000, 2, &[16384, 0, -32768, -32768])).unwrap();
        assert_eq!(sound, Sound { rate: 8000, samples: vec![0.25, -1.0] });
        assert!(Sound::decode(b"MP3").unwrap_err().to_string().contains("Ogg Vorbis"));
    }

    #[test]
    fn a_tone_lies_in_its_band() {
        let mel = MelSpectrogram::new(8000, 20).unwrap();
        let samples = Sound::decode(&wav(8000, 1, &tone(8000, 1000.0, 4000))).unwrap().samples;
        let frames = mel.frames(8000);
        assert_eq!(frames, 100);
        let mut out = vec![0f32; 20 * frames];
        mel.write(&samples, &mut out);
        let loudest = |frame: usize| {
            (0..20).max_by(|a, b| out[a * frames + frame].total_cmp(&out[b * frames + frame])).unwrap()
        };
        // 1000 Hz is 1000 mel of 31 to 2146, in steps of about 100.
        assert!((8..=10).contains(&loudest(10)), "{}", loudest(10));
        assert_eq!(out[frames - 1], (FLOOR as f32).ln(), "silence follows");
        assert!(MelSpectrogram::new(8000, 0).is_err());
    }

    #[test]
    fn names_or_folders_are_classes() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["1_a.wav", "0_b.wav", "1_c.wav"] {
            fs::write(folder.path().join(name), wav(8000, 1, &tone(8000, 500.0, 800))).unwrap();
        }
        fs::write(folder.path().join("0_bad.wav"), b"RIFFnothing").unwrap();
        let set = SoundFolder::open(folder.path(), 16, 0.5).unwrap();
        assert_eq!((set.len(), set.classes().len(), set.quarantined().len(), set.rate()), (3, 2, 1, 8000));
        assert_eq!(set.features()[0].dims, [1, 16, 50]);
        let (mut x, mut y) = (vec![0f32; 16 * 50], [0i64]);
        set.read(
            1,
            &mut Random::new(0),
            &mut [bytemuck::cast_slice_mut(&mut x[..]), bytemuck::cast_slice_mut(&mut y)],
        )
        .unwrap();
        assert_eq!(y, [1]);
        fs::write(folder.path().join("0_other.wav"), wav(16000, 1, &[0; 100])).unwrap();
        let error = SoundFolder::open(folder.path(), 16, 0.5).err().unwrap().to_string();
        assert!(error.contains("one rate"), "{error}");
    }

    #[test]
    fn damaged_files_end_in_a_result() {
        let good = wav(8000, 1, &tone(8000, 500.0, 50));
        for end in 0..good.len() {
            let _ = Sound::decode(&good[..end]);
        }
        for at in 0..good.len().min(64) {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                let _ = Sound::decode(&bytes);
            }
        }
    }
}
