//! Metadata values, read in place.
//!
//! A value is decoded from the mapped header each time it is asked for: nothing of a 32,000-piece
//! vocabulary is copied. The same decoder (`Scan`) checks every value once when a file is opened
//! and reads them afterwards.

use std::fmt;

/// How deep arrays may nest. The specification sets no bound; real files do not nest at all.
pub(crate) const MAX_DEPTH: usize = 8;

macro_rules! kinds {
    ($( $variant:ident = $id:literal, $name:literal, $width:expr; )*) => {
        /// The type of a metadata value. The number is the specification's.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Kind { $(
            #[doc = $name]
            $variant = $id,
        )* }

        impl Kind {
            /// Every type there is.
            pub const ALL: &'static [Kind] = &[$(Kind::$variant),*];

            /// The type with this number.
            pub fn from_id(id: u32) -> Option<Kind> {
                match id { $( $id => Some(Kind::$variant), )* _ => None }
            }

            /// The type's name, for example `u32`.
            pub fn name(self) -> &'static str {
                match self { $( Kind::$variant => $name, )* }
            }

            /// Bytes of a value; `None` for strings and arrays.
            pub fn width(self) -> Option<usize> {
                match self { $( Kind::$variant => $width, )* }
            }
        }
    };
}

kinds! {
    U8    = 0,  "u8",     Some(1);
    I8    = 1,  "i8",     Some(1);
    U16   = 2,  "u16",    Some(2);
    I16   = 3,  "i16",    Some(2);
    U32   = 4,  "u32",    Some(4);
    I32   = 5,  "i32",    Some(4);
    F32   = 6,  "f32",    Some(4);
    Bool  = 7,  "bool",   Some(1);
    Str   = 8,  "string", None;
    Array = 9,  "array",  None;
    U64   = 10, "u64",    Some(8);
    I64   = 11, "i64",    Some(8);
    F64   = 12, "f64",    Some(8);
}

/// A metadata value; strings and arrays borrow the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// An 8-bit unsigned integer.
    U8(u8),
    /// An 8-bit signed integer.
    I8(i8),
    /// A 16-bit unsigned integer.
    U16(u16),
    /// A 16-bit signed integer.
    I16(i16),
    /// A 32-bit unsigned integer.
    U32(u32),
    /// A 32-bit signed integer.
    I32(i32),
    /// A 64-bit unsigned integer.
    U64(u64),
    /// A 64-bit signed integer.
    I64(i64),
    /// A single-precision float.
    F32(f32),
    /// A double-precision float.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    Str(&'a str),
    /// Many values of one type.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// The value's type.
    pub fn kind(&self) -> Kind {
        match self {
            Value::U8(_) => Kind::U8,
            Value::I8(_) => Kind::I8,
            Value::U16(_) => Kind::U16,
            Value::I16(_) => Kind::I16,
            Value::U32(_) => Kind::U32,
            Value::I32(_) => Kind::I32,
            Value::U64(_) => Kind::U64,
            Value::I64(_) => Kind::I64,
            Value::F32(_) => Kind::F32,
            Value::F64(_) => Kind::F64,
            Value::Bool(_) => Kind::Bool,
            Value::Str(_) => Kind::Str,
            Value::Array(_) => Kind::Array,
        }
    }

    /// Any integer type, if the value is one and is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U64(v) => Some(v),
            _ => self.as_i64().and_then(|v| u64::try_from(v).ok()),
        }
    }

    /// Any integer type, if the value is one and fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::I8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::U64(v) => i64::try_from(v).ok(),
            Value::I64(v) => Some(v),
            _ => None,
        }
    }

    /// A float of either width, rounded to single precision.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Value::Str(v) => Some(v),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }

    /// The value as JSON. Floats keep their exact value; a NaN or an infinity, for which JSON has no
    /// word, becomes `null`. An array takes much more memory here than in the file.
    pub fn to_json(&self) -> serde_json::Value {
        match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            Value::F32(v) => f64::from(v).into(),
            Value::F64(v) => v.into(),
            Value::Bool(v) => v.into(),
            Value::Str(v) => v.into(),
            Value::Array(v) => v.iter().map(|v| v.to_json()).collect(),
        }
    }
}

/// The short form for people: long strings and arrays are cut, control characters escaped.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Characters of a string that are shown.
        const CHARS: usize = 100;
        /// Items of an array that are shown.
        const ITEMS: usize = 6;
        match *self {
            Value::U8(v) => v.fmt(f),
            Value::I8(v) => v.fmt(f),
            Value::U16(v) => v.fmt(f),
            Value::I16(v) => v.fmt(f),
            Value::U32(v) => v.fmt(f),
            Value::I32(v) => v.fmt(f),
            Value::U64(v) => v.fmt(f),
            Value::I64(v) => v.fmt(f),
            Value::F32(v) => write!(f, "{v:?}"),
            Value::F64(v) => write!(f, "{v:?}"),
            Value::Bool(v) => v.fmt(f),
            Value::Str(v) => match v.char_indices().nth(CHARS) {
                Some((end, _)) => write!(f, "{:?}… ({} bytes)", &v[..end], v.len()),
                None => write!(f, "{v:?}"),
            },
            Value::Array(v) => {
                write!(f, "[")?;
                for (i, item) in v.iter().take(ITEMS).enumerate() {
                    let comma = if i == 0 { "" } else { ", " };
                    match item {
                        // Only the outermost array shows items, else the short form could be long.
                        Value::Array(a) => write!(f, "{comma}[{} × {}]", a.len(), a.item().name())?,
                        _ => write!(f, "{comma}{item}")?,
                    }
                }
                if v.len() > ITEMS {
                    write!(f, ", … {} × {}", v.len(), v.item().name())?;
                }
                write!(f, "]")
            }
        }
    }
}

/// An array of a file, in place.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    item: Kind,
    len: usize,
    /// Exactly the items' bytes.
    raw: &'a [u8],
    /// See [`Scan::wide`].
    wide: bool,
}

impl<'a> Array<'a> {
    /// The items' type.
    pub fn item(&self) -> Kind {
        self.item
    }

    /// The number of items.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The items.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut scan = Scan::new(self.raw, self.wide);
        let item = self.item;
        // Every item was checked when the file was opened, so no fault ends this early.
        (0..self.len).map_while(move |_| scan.value(item, 0).ok())
    }

    /// The items of an array of strings.
    pub fn strs(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        let mut scan = Scan::new(self.raw, self.wide);
        let len = self.len;
        (self.item == Kind::Str).then(move || (0..len).map_while(move |_| scan.string().ok()))
    }

    /// The items of an array of single-precision floats.
    pub fn f32s(&self) -> Option<impl ExactSizeIterator<Item = f32> + use<'a>> {
        self.words(Kind::F32, f32::from_le_bytes)
    }

    /// The items of an array of 32-bit signed integers.
    pub fn i32s(&self) -> Option<impl ExactSizeIterator<Item = i32> + use<'a>> {
        self.words(Kind::I32, i32::from_le_bytes)
    }

    /// The items of an array of 32-bit unsigned integers.
    pub fn u32s(&self) -> Option<impl ExactSizeIterator<Item = u32> + use<'a>> {
        self.words(Kind::U32, u32::from_le_bytes)
    }

    fn words<T>(
        &self,
        kind: Kind,
        read: fn([u8; 4]) -> T,
    ) -> Option<impl ExactSizeIterator<Item = T> + use<'a, T>> {
        let (words, _) = self.raw.as_chunks::<4>();
        (self.item == kind).then(|| words.iter().map(move |&w| read(w)))
    }
}

/// Equal types and equal items.
impl PartialEq for Array<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.item == other.item && self.len == other.len && self.iter().eq(other.iter())
    }
}

impl fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Value::Array(*self))
    }
}

/// What a header can have wrong with it where values and names are; the offsets are from the start
/// of the scanned bytes.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The bytes end before the thing does.
    End { at: usize, want: u64, have: u64 },
    /// A string that is not UTF-8.
    Utf8 { at: usize },
    /// A truth value that is neither 0 nor 1.
    Bool { found: u8 },
    /// A type number that means nothing.
    Kind { found: u32 },
    /// Arrays nested deeper than [`MAX_DEPTH`].
    Depth,
}

/// Reads little-endian things one after the other, checking every length against what is left.
#[derive(Clone)]
pub(crate) struct Scan<'a> {
    data: &'a [u8],
    at: usize,
    /// Lengths and counts have 64 bits (versions 2 and 3) and not 32 (version 1).
    wide: bool,
}

impl<'a> Scan<'a> {
    pub(crate) fn new(data: &'a [u8], wide: bool) -> Self {
        Scan { data, at: 0, wide }
    }

    /// Goes on reading at a later place.
    pub(crate) fn at(mut self, at: usize) -> Self {
        self.at = at;
        self
    }

    /// Bytes read so far.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub(crate) fn left(&self) -> u64 {
        (self.data.len() - self.at) as u64
    }

    pub(crate) fn wide(&self) -> bool {
        self.wide
    }

    /// The next `n` bytes.
    pub(crate) fn take(&mut self, n: u64) -> Result<&'a [u8], Fault> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n));
        let bytes = end.and_then(|end| self.data.get(self.at..end));
        let bytes = bytes.ok_or(Fault::End {
            at: self.at,
            want: n,
            have: self.left(),
        })?;
        self.at += bytes.len();
        Ok(bytes)
    }

    fn array_of<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let bytes = self.take(N as u64)?;
        Ok(bytes.try_into().expect("take gives as many as asked"))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Fault> {
        self.array_of().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Fault> {
        self.array_of().map(u64::from_le_bytes)
    }

    /// A length, a count or a dimension.
    pub(crate) fn count(&mut self) -> Result<u64, Fault> {
        if self.wide {
            self.u64()
        } else {
            self.u32().map(u64::from)
        }
    }

    /// Bytes of a length, a count or a dimension.
    pub(crate) fn count_width(&self) -> u64 {
        if self.wide { 8 } else { 4 }
    }

    pub(crate) fn kind(&mut self) -> Result<Kind, Fault> {
        let found = self.u32()?;
        Kind::from_id(found).ok_or(Fault::Kind { found })
    }

    /// A length and as many bytes.
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Fault> {
        let n = self.count()?;
        self.take(n)
    }

    pub(crate) fn string(&mut self) -> Result<&'a str, Fault> {
        let bytes = self.bytes()?;
        let at = self.at - bytes.len();
        std::str::from_utf8(bytes).map_err(|_| Fault::Utf8 { at })
    }

    /// A value of a type that is `depth` arrays down.
    pub(crate) fn value(&mut self, kind: Kind, depth: usize) -> Result<Value<'a>, Fault> {
        Ok(match kind {
            Kind::U8 => Value::U8(self.array_of().map(u8::from_le_bytes)?),
            Kind::I8 => Value::I8(self.array_of().map(i8::from_le_bytes)?),
            Kind::U16 => Value::U16(self.array_of().map(u16::from_le_bytes)?),
            Kind::I16 => Value::I16(self.array_of().map(i16::from_le_bytes)?),
            Kind::U32 => Value::U32(self.u32()?),
            Kind::I32 => Value::I32(self.array_of().map(i32::from_le_bytes)?),
            Kind::F32 => Value::F32(self.array_of().map(f32::from_le_bytes)?),
            Kind::U64 => Value::U64(self.u64()?),
            Kind::I64 => Value::I64(self.array_of().map(i64::from_le_bytes)?),
            Kind::F64 => Value::F64(self.array_of().map(f64::from_le_bytes)?),
            Kind::Bool => match self.array_of()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                // The specification: anything else is invalid.
                [found] => return Err(Fault::Bool { found }),
            },
            Kind::Str => Value::Str(self.string()?),
            Kind::Array => Value::Array(self.array(depth)?),
        })
    }

    /// An array with all that is in it.
    fn array(&mut self, depth: usize) -> Result<Array<'a>, Fault> {
        if depth >= MAX_DEPTH {
            return Err(Fault::Depth);
        }
        let (item, len) = self.array_head()?;
        let from = self.at;
        match item.width() {
            Some(width) => {
                // A product past u64 is past the end of any file.
                let bytes = self.take(len.saturating_mul(width as u64))?;
                let odd = bytes.iter().find(|&&b| b > 1);
                if let (Kind::Bool, Some(&found)) = (item, odd) {
                    return Err(Fault::Bool { found });
                }
            }
            None if item == Kind::Str => {
                for _ in 0..len {
                    self.string()?;
                }
            }
            None => {
                for _ in 0..len {
                    self.array(depth + 1)?;
                }
            }
        }
        self.array_from(item, len, &self.data[from..self.at])
    }

    /// An array that was checked before and takes all bytes that are left.
    pub(crate) fn checked_array(&mut self) -> Result<Array<'a>, Fault> {
        let (item, len) = self.array_head()?;
        let rest = self.take(self.left())?;
        self.array_from(item, len, rest)
    }

    fn array_head(&mut self) -> Result<(Kind, u64), Fault> {
        let item = self.kind()?;
        let len = self.count()?;
        Ok((item, len))
    }

    fn array_from(&self, item: Kind, len: u64, raw: &'a [u8]) -> Result<Array<'a>, Fault> {
        let wide = self.wide;
        // Each item has a byte at least, so that a length past usize cannot come here.
        let len = usize::try_from(len).map_err(|_| Fault::End {
            at: self.at,
            want: len,
            have: raw.len() as u64,
        })?;
        Ok(Array {
            item,
            len,
            raw,
            wide,
        })
    }
}
