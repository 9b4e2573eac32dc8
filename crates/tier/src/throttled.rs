use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lightering_units::{Bytes, BytesPerSecond, Seconds};

use crate::{ByteSource, TierError};

/// A store made as slow as another kind of it: an emulated tier (a weaker disk, far memory, a peer) with a rate that all
/// readers share and a latency that each read pays.
pub struct ThrottledSource {
    inner: Arc<dyn ByteSource>,
    rate: BytesPerSecond,
    latency: Seconds,
    /// When the bytes that were asked for so far will have passed.
    busy_until: Mutex<Instant>,
}

impl std::fmt::Debug for ThrottledSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {} with {}", self.inner.name(), self.rate, self.latency)
    }
}

/// The longest that one read may be made to take.
const READ_SECONDS_MAX: f64 = 3600.0;

impl ThrottledSource {
    /// Slows `inner` down; it is never made faster than it is.
    ///
    /// # Errors
    /// `Invalid` for a rate that is not positive or a latency that is negative.
    pub fn new(
        inner: Arc<dyn ByteSource>,
        rate: BytesPerSecond,
        latency: Seconds,
    ) -> Result<ThrottledSource, TierError> {
        if !(rate.0 > 0.0 && (0.0..=READ_SECONDS_MAX).contains(&latency.0)) {
            return Err(TierError::Invalid(format!(
                "a tier of {rate} with a latency of {latency}; expected a positive rate and a latency of 0 to 1 h"
            )));
        }
        Ok(ThrottledSource { inner, rate, latency, busy_until: Mutex::new(Instant::now()) })
    }

    /// Takes `bytes` of the shared rate and says when they will have arrived.
    fn arrival(&self, bytes: usize) -> Instant {
        let passing = (bytes as f64 / self.rate.0).min(READ_SECONDS_MAX);
        let mut busy_until = self.busy_until.lock().unwrap_or_else(PoisonError::into_inner);
        *busy_until = (*busy_until).max(Instant::now()) + Duration::from_secs_f64(passing);
        *busy_until + Duration::from_secs_f64(self.latency.0)
    }
}

impl ByteSource for ThrottledSource {
    fn len_bytes(&self) -> Bytes {
        self.inner.len_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let arrival = self.arrival(buffer.len());
        self.inner.read_at(offset, buffer)?;
        std::thread::sleep(arrival.saturating_duration_since(Instant::now()));
        Ok(())
    }

    fn is_direct(&self) -> bool {
        self.inner.is_direct()
    }

    fn read_pages(&self, offset: u64, pages: &mut [u8]) -> io::Result<usize> {
        let arrival = self.arrival(pages.len());
        let filled = self.inner.read_pages(offset, pages)?;
        std::thread::sleep(arrival.saturating_duration_since(Instant::now()));
        Ok(filled)
    }

    fn bytes_read(&self) -> Bytes {
        self.inner.bytes_read()
    }

    fn name(&self) -> String {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_the_rate_and_get_the_bytes() {
        let inner: Arc<dyn ByteSource> = Arc::new((0..200u8).collect::<Vec<u8>>());
        let slow = ThrottledSource::new(inner.clone(), BytesPerSecond(10_000.0), Seconds(0.0)).unwrap();
        let before = Instant::now();
        std::thread::scope(|s| {
            for offset in [0u8, 100] {
                let slow = &slow;
                s.spawn(move || {
                    let mut buffer = [0; 100];
                    slow.read_at(offset.into(), &mut buffer).unwrap();
                    assert_eq!((buffer[0], buffer[99]), (offset, offset + 99));
                });
            }
        });
        // A lower bound that holds on any machine: 200 bytes at 10 kB/s.
        assert!(before.elapsed() >= Duration::from_millis(20));
        assert!(slow.read_at(150, &mut [0; 51]).is_err());
        for (rate, latency) in [(0.0, 0.0), (f64::NAN, 0.0), (1.0, -1.0), (1.0, f64::INFINITY)] {
            assert!(ThrottledSource::new(inner.clone(), BytesPerSecond(rate), Seconds(latency)).is_err());
        }
    }
}
