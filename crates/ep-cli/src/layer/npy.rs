//! Reading of `.npy` files (NumPy's format, versions 1 to 3) that hold recorded routing: int64,
//! little-endian, C order, three dimensions.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

/// A three-dimensional array of int64.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Array3 {
    pub(crate) shape: [usize; 3],
    /// C order.
    pub(crate) values: Vec<i64>,
}

impl Array3 {
    /// Elements of the matrix at `index` of the first dimension.
    pub(crate) fn matrix(&self, index: usize) -> &[i64] {
        let size = self.shape[1] * self.shape[2];
        &self.values[index * size..(index + 1) * size]
    }
}

/// Why a file is not such an array.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NpyError {
    #[error("it cannot be read; check the path and its permissions")]
    Io(#[from] io::Error),
    #[error("it does not begin with \\x93NUMPY; save it with numpy.save")]
    Magic,
    #[error(
        "format version {major}.{minor} is not known; save it with numpy.save, which writes 1.0"
    )]
    Version { major: u8, minor: u8 },
    #[error("its header of {bytes} bytes is longer than {MAX_HEADER}; the file is damaged")]
    HeaderSize { bytes: u64 },
    #[error("its header does not say what {key:?} is, or not in a way that numpy.save writes")]
    Header { key: &'static str },
    #[error("its elements are {descr:?}, not '<i8'; save it with .astype('<i8')")]
    Dtype { descr: String },
    #[error("it is in Fortran order; save numpy.ascontiguousarray of it")]
    FortranOrder,
    #[error("its shape is {shape:?}; [ranks, tokens, top_k] is needed")]
    Dimensions { shape: Vec<usize> },
    #[error("its shape {shape:?} asks for more elements than memory can address")]
    TooLarge { shape: [usize; 3] },
    #[error("it ends after {got} of {expected} bytes of data; copy it again")]
    Truncated { expected: usize, got: usize },
    #[error("it goes on after the {expected} bytes of data that its shape asks for")]
    TrailingData { expected: usize },
}

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// NumPy itself refuses longer headers unless told otherwise.
const MAX_HEADER: u64 = 10_000;

/// Reads the array in `path`.
pub(crate) fn read(path: &Path) -> Result<Array3, NpyError> {
    parse(BufReader::new(File::open(path)?))
}

fn parse(mut input: impl Read) -> Result<Array3, NpyError> {
    let mut start = [0; 8];
    read_or(&mut input, &mut start, || NpyError::Magic)?;
    let [magic @ .., major, minor] = start;
    if magic != *MAGIC {
        return Err(NpyError::Magic);
    }
    let shape = shape_of(&header(&mut input, major, minor)?)?;

    let expected = shape
        .iter()
        .try_fold(size_of::<i64>(), |product, &n| product.checked_mul(n))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or(NpyError::TooLarge { shape })?;
    let mut data = Vec::new();
    input
        .by_ref()
        .take(expected as u64)
        .read_to_end(&mut data)?;
    if data.len() < expected {
        return Err(NpyError::Truncated {
            expected,
            got: data.len(),
        });
    }
    if input.read(&mut [0])? != 0 {
        return Err(NpyError::TrailingData { expected });
    }
    let values = data
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| i64::from_le_bytes(bytes))
        .collect();
    Ok(Array3 { shape, values })
}

/// The header's text: a Python dictionary.
fn header(input: &mut impl Read, major: u8, minor: u8) -> Result<String, NpyError> {
    let damaged = || NpyError::Header { key: "descr" };
    let bytes = match (major, minor) {
        (1, 0) => {
            let mut length = [0; 2];
            read_or(input, &mut length, damaged)?;
            u64::from(u16::from_le_bytes(length))
        }
        (2 | 3, 0) => {
            let mut length = [0; 4];
            read_or(input, &mut length, damaged)?;
            u64::from(u32::from_le_bytes(length))
        }
        _ => return Err(NpyError::Version { major, minor }),
    };
    if bytes > MAX_HEADER {
        return Err(NpyError::HeaderSize { bytes });
    }
    let mut text = vec![0; bytes as usize];
    read_or(input, &mut text, damaged)?;
    // Version 1 and 2 are Latin-1, 3 is UTF-8; what is valid here is ASCII in all of them.
    String::from_utf8(text).map_err(|_| damaged())
}

fn shape_of(header: &str) -> Result<[usize; 3], NpyError> {
    let descr = value(header, "descr")?;
    match descr.trim_matches(['\'', '"']) {
        "<i8" => {}
        other => {
            return Err(NpyError::Dtype {
                descr: other.to_owned(),
            });
        }
    }
    match value(header, "fortran_order")? {
        "False" => {}
        "True" => return Err(NpyError::FortranOrder),
        _ => {
            return Err(NpyError::Header {
                key: "fortran_order",
            });
        }
    }
    let damaged = || NpyError::Header { key: "shape" };
    let tuple = value(header, "shape")?;
    let inner = tuple
        .strip_prefix('(')
        .and_then(|t| t.strip_suffix(')'))
        .ok_or_else(damaged)?;
    let mut items: Vec<&str> = inner.split(',').map(str::trim).collect();
    if items.last().is_some_and(|item| item.is_empty()) {
        items.pop();
    }
    let shape: Vec<usize> = items
        .into_iter()
        .map(|item| item.parse().map_err(|_| damaged()))
        .collect::<Result<_, _>>()?;
    shape
        .try_into()
        .map_err(|shape| NpyError::Dimensions { shape })
}

/// The text of the value of `key` in a flat Python dictionary, as numpy.save writes it: up to the
/// comma or brace that ends it, commas inside a tuple or list not counted.
fn value<'a>(header: &'a str, key: &'static str) -> Result<&'a str, NpyError> {
    let damaged = || NpyError::Header { key };
    let after = ['\'', '"']
        .into_iter()
        .find_map(|quote| header.split_once(&format!("{quote}{key}{quote}")))
        .ok_or_else(damaged)?
        .1;
    let text = after.trim_start().strip_prefix(':').ok_or_else(damaged)?;
    let mut depth = 0_usize;
    let end = text
        .find(|c| {
            match c {
                '(' | '[' => depth += 1,
                ')' | ']' => depth = depth.saturating_sub(1),
                ',' | '}' => return depth == 0,
                _ => {}
            }
            false
        })
        .ok_or_else(damaged)?;
    Ok(text[..end].trim())
}

/// Fills `out`, with `early` as the error when the input ends first.
fn read_or(
    input: &mut impl Read,
    out: &mut [u8],
    early: impl FnOnce() -> NpyError,
) -> Result<(), NpyError> {
    input.read_exact(out).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => early(),
        _ => NpyError::Io(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(major: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([major, 0]);
        match major {
            1 => bytes.extend((header.len() as u16).to_le_bytes()),
            _ => bytes.extend((header.len() as u32).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn data(values: impl IntoIterator<Item = i64>) -> Vec<u8> {
        values.into_iter().flat_map(i64::to_le_bytes).collect()
    }

    /// The header that NumPy 1.x and 2.x write, padding included.
    const HEADER: &str =
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 1, 3), }          \n";

    #[test]
    fn reads_every_version() {
        for major in [1, 2, 3] {
            let array = parse(&file(major, HEADER, &data([0, -1, 2, 3, 4, i64::MIN]))[..]).unwrap();
            assert_eq!(array.shape, [2, 1, 3]);
            assert_eq!(array.matrix(0), [0, -1, 2]);
            assert_eq!(array.matrix(1), [3, 4, i64::MIN]);
        }
    }

    #[test]
    fn reads_a_header_in_another_order_and_with_double_quotes() {
        let header = r#"{"shape": (1, 2, 1), "fortran_order": False, "descr": "<i8"}"#;
        let array = parse(&file(1, header, &data([5, 6]))[..]).unwrap();
        assert_eq!(
            array,
            Array3 {
                shape: [1, 2, 1],
                values: vec![5, 6]
            }
        );
    }

    #[test]
    fn an_empty_dimension_is_an_empty_array() {
        let header = HEADER.replace("(2, 1, 3)", "(2, 0, 3)");
        assert!(parse(&file(1, &header, &[])[..]).unwrap().values.is_empty());
    }

    #[test]
    fn names_what_is_wrong() {
        let six = data(0..6);
        let with = |from: &str, to: &str| file(1, &HEADER.replace(from, to), &six);
        macro_rules! refused {
            ($bytes:expr, $pattern:pat) => {
                let error = parse(&$bytes[..]).unwrap_err();
                assert!(matches!(error, $pattern), "{error:?}");
            };
        }
        refused!(b"", NpyError::Magic);
        refused!(b"PK\x03\x04 a zip file", NpyError::Magic);
        refused!(
            file(9, HEADER, &six),
            NpyError::Version { major: 9, minor: 0 }
        );
        refused!(file(1, HEADER, &six)[..30], NpyError::Header { .. });
        refused!(
            file(2, &" ".repeat(20_000), &six),
            NpyError::HeaderSize { bytes: 20_000 }
        );
        refused!(with("'<i8'", "'<i4'"), NpyError::Dtype { .. });
        refused!(with("'<i8'", "'>i8'"), NpyError::Dtype { .. });
        refused!(
            with("'<i8'", "[('a', '<i8'), ('b', '<i8')]"),
            NpyError::Dtype { .. }
        );
        refused!(with("descr", "dtype"), NpyError::Header { key: "descr" });
        refused!(with("False", "True"), NpyError::FortranOrder);
        refused!(
            with("False", "0"),
            NpyError::Header {
                key: "fortran_order"
            }
        );
        refused!(with("(2, 1, 3)", "(2, 3)"), NpyError::Dimensions { .. });
        refused!(with("(2, 1, 3)", "(6,)"), NpyError::Dimensions { .. });
        refused!(with("(2, 1, 3)", "()"), NpyError::Dimensions { .. });
        refused!(
            with("(2, 1, 3)", "(2, -1, 3)"),
            NpyError::Header { key: "shape" }
        );
        refused!(
            with("(2, 1, 3)", "(4294967296, 4294967296, 2)"),
            NpyError::TooLarge { .. }
        );
        refused!(
            file(1, HEADER, &six[..47]),
            NpyError::Truncated {
                expected: 48,
                got: 47
            }
        );
        refused!(
            file(1, HEADER, &data(0..7)),
            NpyError::TrailingData { expected: 48 }
        );
    }

    #[test]
    fn a_missing_file_is_an_io_error() {
        let error = read(Path::new("/nonexistent/routing.npy")).unwrap_err();
        assert!(matches!(error, NpyError::Io(_)), "{error:?}");
    }
}
