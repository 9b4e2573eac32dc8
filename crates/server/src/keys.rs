//! API keys.

use sha2::{Digest, Sha256};

/// The keys that are accepted, as digests: comparing those tells nothing of a key's length or beginning by its time.
#[derive(Debug)]
pub(crate) struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    pub fn new(keys: &[String]) -> Keys {
        Keys { digests: keys.iter().map(|key| Sha256::digest(key.as_bytes()).into()).collect() }
    }

    /// Whether the value of an `Authorization` header opens the door.
    pub fn accept(&self, header: Option<&[u8]>) -> bool {
        if self.digests.is_empty() {
            return true;
        }
        let Some(header) = header else { return false };
        let Some((scheme, key)) = header.split_at_checked(7) else { return false };
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return false;
        }
        let digest: [u8; 32] = Sha256::digest(key.trim_ascii()).into();
        // All keys are looked at, and all of their bytes.
        self.digests.iter().fold(false, |found, other| {
            let difference = digest.iter().zip(other).fold(0u8, |all, (a, b)| all | (a ^ b));
            found | (std::hint::black_box(difference) == 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Keys;

    #[test]
    fn only_the_right_keys_are_accepted() {
        assert!(Keys::new(&[]).accept(None));
        let keys = Keys::new(&["one".into(), "two".into()]);
        assert!(keys.accept(Some(b"Bearer one")));
        assert!(keys.accept(Some(b"bearer two ")));
        for wrong in [&b"Bearer on"[..], b"Bearer onee", b"Bearer ", b"one", b"Basic one", b""] {
            assert!(!keys.accept(Some(wrong)), "{wrong:?}");
        }
        assert!(!keys.accept(None));
    }
}
