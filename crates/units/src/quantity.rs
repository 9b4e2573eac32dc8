use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::str::FromStr;

/// A text that is not a quantity: what was read and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot read {text:?} as {expected}")]
pub struct ParseUnitError {
    /// The text as given.
    pub text: String,
    /// What would have been accepted, with an example.
    pub expected: &'static str,
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Bytes = Bytes(0);

    /// `n` × 1024 bytes.
    pub const fn kib(n: u64) -> Bytes {
        Bytes(n << 10)
    }

    /// `n` × 1024² bytes.
    pub const fn mib(n: u64) -> Bytes {
        Bytes(n << 20)
    }

    /// The count as `usize`; saturates on 32-bit targets.
    pub fn to_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// Difference, or zero when `other` is larger.
    pub const fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// Rounded up to a multiple of `alignment` (a power of two).
    pub const fn align_up(self, alignment: u64) -> Bytes {
        Bytes((self.0 + alignment - 1) & !(alignment - 1))
    }
}

const BYTE_UNITS: [(&str, f64); 10] = [
    ("kib", 1024.0),
    ("mib", 1048576.0),
    ("gib", 1073741824.0),
    ("tib", 1099511627776.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("tb", 1e12),
    ("b", 1.0),
    ("", 1.0),
];

fn split_number(text: &str) -> Option<(f64, String)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    (number.is_finite()).then(|| (number, text[end..].trim().to_ascii_lowercase()))
}

impl FromStr for Bytes {
    type Err = ParseUnitError;

    /// Reads `"512MiB"`, `"1.5 GiB"`, `"64kb"`, `"1000"`; units are case-insensitive, `KiB` is 1024 and `kB` 1000.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error =
            || ParseUnitError { text: text.to_owned(), expected: "a size such as 64MiB, 1.5GiB or 500kB" };
        let (number, unit) = split_number(text).ok_or_else(error)?;
        let (_, factor) = BYTE_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?;
        let bytes = number * factor;
        if bytes > 2f64.powi(63) {
            return Err(error());
        }
        Ok(Bytes(bytes.round() as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1048576 => write!(f, "{:.1} KiB", b / 1024.0),
            1048576..1073741824 => write!(f, "{:.2} MiB", b / 1048576.0),
            _ => write!(f, "{:.2} GiB", b / 1073741824.0),
        }
    }
}

impl Add for Bytes {
    type Output = Bytes;
    fn add(self, o: Bytes) -> Bytes {
        Bytes(self.0 + o.0)
    }
}
impl AddAssign for Bytes {
    fn add_assign(&mut self, o: Bytes) {
        self.0 += o.0;
    }
}
impl Sub for Bytes {
    type Output = Bytes;
    fn sub(self, o: Bytes) -> Bytes {
        Bytes(self.0 - o.0)
    }
}
impl Mul<u64> for Bytes {
    type Output = Bytes;
    fn mul(self, n: u64) -> Bytes {
        Bytes(self.0 * n)
    }
}
impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(iter: I) -> Bytes {
        iter.fold(Bytes::ZERO, Add::add)
    }
}

macro_rules! float_unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);
        impl Add for $name {
            type Output = $name;
            fn add(self, o: $name) -> $name { $name(self.0 + o.0) }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, o: $name) { self.0 += o.0; }
        }
        impl Sub for $name {
            type Output = $name;
            fn sub(self, o: $name) -> $name { $name(self.0 - o.0) }
        }
        impl Mul<f64> for $name {
            type Output = $name;
            fn mul(self, n: f64) -> $name { $name(self.0 * n) }
        }
        impl Div for $name {
            type Output = f64;
            fn div(self, o: $name) -> f64 { self.0 / o.0 }
        }
        impl std::iter::Sum for $name {
            fn sum<I: Iterator<Item = $name>>(iter: I) -> $name { iter.fold($name(0.0), Add::add) }
        }
    };
}

float_unit!(
    /// A duration in seconds.
    Seconds
);
float_unit!(
    /// An amount of energy in joules.
    Joules
);
float_unit!(
    /// A power in watts.
    Watts
);
float_unit!(
    /// A data rate in bytes per second.
    BytesPerSecond
);
float_unit!(
    /// A number of floating-point (or integer multiply/add) operations; a multiply-add counts as two.
    Flops
);
float_unit!(
    /// A compute rate in operations per second.
    FlopsPerSecond
);

impl Div<BytesPerSecond> for Bytes {
    type Output = Seconds;
    fn div(self, rate: BytesPerSecond) -> Seconds {
        Seconds(self.0 as f64 / rate.0)
    }
}
impl Div<Seconds> for Bytes {
    type Output = BytesPerSecond;
    fn div(self, time: Seconds) -> BytesPerSecond {
        BytesPerSecond(self.0 as f64 / time.0)
    }
}
impl Div<FlopsPerSecond> for Flops {
    type Output = Seconds;
    fn div(self, rate: FlopsPerSecond) -> Seconds {
        Seconds(self.0 / rate.0)
    }
}
impl Mul<Seconds> for Watts {
    type Output = Joules;
    fn mul(self, time: Seconds) -> Joules {
        Joules(self.0 * time.0)
    }
}

impl Seconds {
    /// The larger of the two; `other` when `self` is not a number.
    pub fn max(self, other: Seconds) -> Seconds {
        Seconds(self.0.max(other.0))
    }
}

impl FromStr for Seconds {
    type Err = ParseUnitError;

    /// Reads `"20ms"`, `"1.5s"`, `"300us"`, `"2min"`; a bare number is seconds.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error =
            || ParseUnitError { text: text.to_owned(), expected: "a duration such as 20ms, 1.5s or 2min" };
        let (number, unit) = split_number(text).ok_or_else(error)?;
        let factor = match unit.as_str() {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "" | "s" => 1.0,
            "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(error()),
        };
        Ok(Seconds(number * factor))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0;
        if s < 1e-3 {
            write!(f, "{:.1} µs", s * 1e6)
        } else if s < 1.0 {
            write!(f, "{:.2} ms", s * 1e3)
        } else {
            write!(f, "{s:.2} s")
        }
    }
}
impl fmt::Display for Joules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} J", self.0)
    }
}
impl fmt::Display for Watts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} W", self.0)
    }
}
impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 1e9 {
            write!(f, "{:.2} GB/s", self.0 / 1e9)
        } else {
            write!(f, "{:.1} MB/s", self.0 / 1e6)
        }
    }
}
impl fmt::Display for Flops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 1e9 {
            write!(f, "{:.2} GFLOP", self.0 / 1e9)
        } else {
            write!(f, "{:.2} MFLOP", self.0 / 1e6)
        }
    }
}
impl fmt::Display for FlopsPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} GFLOP/s", self.0 / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_parse_and_print() {
        let check = |text: &str, bytes: u64| assert_eq!(text.parse::<Bytes>(), Ok(Bytes(bytes)), "{text}");
        check("512MiB", 512 << 20);
        check("1.5 GiB", 3 << 29);
        check("64kb", 64_000);
        check("1000", 1000);
        check("0", 0);
        for bad in ["", "MiB", "1.2.3MiB", "-1MiB", "5 parsecs", "99999999999TiB", "NaN", "inf"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?} must be refused");
        }
        assert_eq!(Bytes::mib(64).to_string(), "64.00 MiB");
        assert_eq!(Bytes(17).align_up(16), Bytes(32));
    }

    #[test]
    fn seconds_parse() {
        assert_eq!("20ms".parse::<Seconds>(), Ok(Seconds(0.02)));
        assert_eq!("2min".parse::<Seconds>(), Ok(Seconds(120.0)));
        assert!("20mm".parse::<Seconds>().is_err());
    }

    #[test]
    fn quantities_combine() {
        assert_eq!(Bytes(100) / BytesPerSecond(50.0), Seconds(2.0));
        assert_eq!(Watts(5.0) * Seconds(2.0), Joules(10.0));
    }
}
