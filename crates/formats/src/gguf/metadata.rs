use crate::{Error, Result};

/// An array of the metadata, stored by the type of its elements.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Strings(Vec<String>),
    Arrays(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::Strings(v) => v.len(),
            Array::Arrays(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements, for messages.
    pub fn element_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::F32(_) => "f32",
            Array::Bool(_) => "bool",
            Array::Strings(_) => "string",
            Array::Arrays(_) => "array",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F64(_) => "f64",
        }
    }
}

impl Value {
    /// The type and, for an array, its length, for messages: `u32`, `array of 32000 string`.
    pub fn type_name(&self) -> String {
        let name = match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(a) => return format!("array of {} {}", a.len(), a.element_name()),
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
        };
        name.to_owned()
    }

    fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.to_owned())
    }
}

/// The keys and values of a file, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    /// Indices of `entries` in the order of their keys.
    by_key: Vec<u32>,
}

impl Metadata {
    /// Metadata with these entries; the error is a key that stands twice.
    pub(super) fn from_entries(entries: Vec<(String, Value)>) -> std::result::Result<Metadata, String> {
        let mut by_key: Vec<u32> = (0..entries.len() as u32).collect();
        let key = |i: u32| &entries[i as usize].0;
        by_key.sort_by(|a, b| key(*a).cmp(key(*b)));
        match by_key.windows(2).find(|w| key(w[0]) == key(w[1])) {
            Some(w) => Err(key(w[0]).clone()),
            None => Ok(Metadata { entries, by_key }),
        }
    }

    /// Every key with its value, in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True without keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let found = self.by_key.binary_search_by(|i| self.entries[*i as usize].0.as_str().cmp(key));
        found.ok().map(|at| &self.entries[self.by_key[at] as usize].1)
    }

    /// Sets `key`, replacing its value if it has one.
    pub fn set(&mut self, key: &str, value: Value) {
        match self.by_key.binary_search_by(|i| self.entries[*i as usize].0.as_str().cmp(key)) {
            Ok(at) => self.entries[self.by_key[at] as usize].1 = value,
            Err(at) => {
                self.by_key.insert(at, self.entries.len() as u32);
                self.entries.push((key.to_owned(), value));
            }
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || {
            let found = match value {
                Value::String(_) | Value::Array(_) => value.type_name(),
                _ => format!("{value:?}"),
            };
            Error::invalid(format!("metadata key {key:?}"), found, expected)
        };
        convert(value).map(Some).ok_or_else(wrong)
    }

    /// A whole number that is not negative, of whatever integer type.
    ///
    /// # Errors
    /// The key has another type or a negative value; the same holds for the other getters.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer that is not negative", Value::as_u64)
    }

    /// A float.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", |v| match *v {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        })
    }

    /// A text.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(v) => Some(v.as_str()),
            _ => None,
        })
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| match v {
            Value::Bool(v) => Some(*v),
            _ => None,
        })
    }

    /// An array of texts.
    pub fn get_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::Strings(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of f32.
    pub fn get_f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", |v| match v {
            Value::Array(Array::F32(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of i32.
    pub fn get_i32s(&self, key: &str) -> Result<Option<&[i32]>> {
        self.typed(key, "an array of i32", |v| match v {
            Value::Array(Array::I32(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of whole numbers that are not negative, of whatever integer type.
    pub fn get_u64s(&self, key: &str) -> Result<Option<Vec<u64>>> {
        fn all<T: Copy + TryInto<u64>>(values: &[T]) -> Option<Vec<u64>> {
            values.iter().map(|v| (*v).try_into().ok()).collect()
        }
        self.typed(key, "an array of integers that are not negative", |v| match v {
            Value::Array(Array::U8(v)) => all(v),
            Value::Array(Array::I8(v)) => all(v),
            Value::Array(Array::U16(v)) => all(v),
            Value::Array(Array::I16(v)) => all(v),
            Value::Array(Array::U32(v)) => all(v),
            Value::Array(Array::I32(v)) => all(v),
            Value::Array(Array::U64(v)) => all(v),
            Value::Array(Array::I64(v)) => all(v),
            _ => None,
        })
    }

    fn missing(key: &str, expected: &str) -> Error {
        Error::invalid(format!("metadata key {key:?}"), "the key is missing", expected)
    }

    /// As [`get_u64`](Self::get_u64); a missing key is an error.
    pub fn require_u64(&self, key: &str) -> Result<u64> {
        self.get_u64(key)?.ok_or_else(|| Self::missing(key, "an integer"))
    }

    /// As [`get_f32`](Self::get_f32); a missing key is an error.
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        self.get_f32(key)?.ok_or_else(|| Self::missing(key, "a float"))
    }

    /// As [`get_str`](Self::get_str); a missing key is an error.
    pub fn require_str(&self, key: &str) -> Result<&str> {
        self.get_str(key)?.ok_or_else(|| Self::missing(key, "a string"))
    }

    /// As [`get_strings`](Self::get_strings); a missing key is an error.
    pub fn require_strings(&self, key: &str) -> Result<&[String]> {
        self.get_strings(key)?.ok_or_else(|| Self::missing(key, "an array of strings"))
    }
}
