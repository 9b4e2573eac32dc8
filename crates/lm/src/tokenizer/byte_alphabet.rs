//! The 256 printable characters with which byte-level vocabularies write bytes (GPT-2's `bytes_to_unicode`).

/// The character that stands for `byte`.
pub(crate) fn character(byte: u8) -> char {
    // Printable Latin-1 stands for itself; the other 68 bytes follow in order from U+0100.
    let shifted = match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte) - 0x7f,
        0xad => 0x143,
    };
    char::from_u32(shifted).expect("all of these lie below the surrogates")
}

/// The byte that `character` stands for, if any.
pub(super) fn byte(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_has_its_own_character() {
        let mut seen = std::collections::BTreeSet::new();
        for byte in 0..=255 {
            let character = super::character(byte);
            assert_eq!(super::byte(character), Some(byte));
            assert!(seen.insert(character));
        }
        assert_eq!(super::character(b' '), 'Ġ');
        assert_eq!(super::byte('▁'), None);
    }
}
