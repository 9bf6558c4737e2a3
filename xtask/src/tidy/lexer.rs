//! Just enough of Rust's and C++'s lexical structure to tell code from text.

/// What [`blank`] keeps.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Code alone.
    Code,
    /// Code and string literals.
    Strings,
}

/// The source with comments, character literals and, for [`Keep::Code`], the insides of string
/// literals replaced by spaces. Offsets and lines stay.
pub(super) fn blank(source: &str, keep: Keep) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let (length, erase) = if rest.starts_with(b"//") {
            (find(rest, b"\n").unwrap_or(rest.len()), true)
        } else if rest.starts_with(b"/*") {
            (block_comment(rest), true)
        } else if rest[0] == b'r' && !follows_word(bytes, at) && raw_string(rest).is_some() {
            (raw_string(rest).unwrap_or(1), keep == Keep::Code)
        } else if rest[0] == b'"' {
            (string(rest), keep == Keep::Code)
        } else if rest[0] == b'\'' {
            let length = character(rest);
            (length, length > 1)
        } else {
            (1, false)
        };
        if erase {
            for byte in &mut out[at..at + length] {
                if *byte != b'\n' {
                    *byte = b' ';
                }
            }
        }
        at += length;
    }
    // Only whole literals and comments were replaced, so no character was cut in two.
    String::from_utf8_lossy(&out).into_owned()
}

/// Every identifier or keyword with its offset.
pub(super) fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_word = |c: char| c == '_' || c.is_alphanumeric();
    let mut rest = code;
    std::iter::from_fn(move || {
        let start = rest.find(is_word)?;
        let word = &rest[start..];
        let word = &word[..word.find(|c| !is_word(c)).unwrap_or(word.len())];
        let offset = code.len() - rest.len() + start;
        rest = &code[offset + word.len()..];
        Some((offset, word))
    })
}

/// The length of a balanced pair of parentheses at the start of `code`.
pub(super) fn parentheses(code: &str) -> Option<usize> {
    balanced(code, b'(', b')')
}

/// The length of a balanced pair of braces at the start of `code`.
pub(super) fn braces(code: &str) -> Option<usize> {
    balanced(code, b'{', b'}')
}

fn balanced(code: &str, open: u8, close: u8) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate() {
        if byte == open {
            depth += 1;
        } else if byte == close {
            depth = depth.checked_sub(1)?;
        }
        if depth == 0 {
            return (byte == close).then_some(at + 1);
        }
    }
    None
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1] == b'_' || bytes[at - 1].is_ascii_alphanumeric())
        // `br"..."`: the b belongs to the literal.
        && !(bytes[at - 1] == b'b' && (at == 1 || !bytes[at - 2].is_ascii_alphanumeric()))
}

/// Nested, as Rust has them; C's are not, but none here contains another's opening.
fn block_comment(bytes: &[u8]) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
        } else {
            at += 1;
        }
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

fn raw_string(bytes: &[u8]) -> Option<usize> {
    let hashes = bytes[1..].iter().take_while(|byte| **byte == b'#').count();
    let open = 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &bytes[1..open]].concat();
    let inside = find(&bytes[open + 1..], &close);
    Some(inside.map_or(bytes.len(), |inside| open + 1 + inside + close.len()))
}

fn string(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The length of a character literal, or 1 for the quote of a lifetime or of a C++ number.
fn character(bytes: &[u8]) -> usize {
    if bytes.get(1) == Some(&b'\\') {
        return find(&bytes[3.min(bytes.len())..], b"'").map_or(1, |inside| inside + 4);
    }
    let text = String::from_utf8_lossy(&bytes[1..bytes.len().min(6)]);
    let Some(inside) = text.chars().next() else {
        return 1;
    };
    let close = 1 + inside.len_utf8();
    if bytes.get(close) == Some(&b'\'') {
        close + 1
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_left() {
        let source =
            "a /* b /* c */ d */ e // f\ng(\"h \\\" i\", 'j', '\\'', 'k: loop, r#\"l\"m\"#)";
        let code = blank(source, Keep::Code);
        assert_eq!(code.len(), source.len());
        let found: Vec<_> = words(&code).map(|(_, word)| word).collect();
        assert_eq!(found, ["a", "e", "g", "k", "loop"]);
        assert_eq!(code.matches('\n').count(), 1);
    }

    #[test]
    fn strings_are_kept_when_asked_for() {
        let source = "f(\"x // y\"); // \"z\"";
        assert_eq!(blank(source, Keep::Strings).trim_end(), "f(\"x // y\");");
    }

    #[test]
    fn digit_separators_and_lifetimes_open_no_literal() {
        let source = "f<'a>(1'000'000, x /* 'é' */, 'é')";
        let code = blank(source, Keep::Code);
        assert!(code.contains("1'000'000, x"), "{code}");
        assert!(!code.contains('é'));
    }

    #[test]
    fn words_come_with_their_offsets() {
        let code = "unsafe fn f2()";
        let found: Vec<_> = words(code).collect();
        assert_eq!(found, [(0, "unsafe"), (7, "fn"), (10, "f2")]);
    }

    #[test]
    fn parentheses_are_balanced() {
        assert_eq!(parentheses("(a(b)c) d"), Some(7));
        assert_eq!(parentheses("(a(b)c"), None);
        assert_eq!(parentheses("a"), None);
        assert_eq!(braces("{ { } } }"), Some(7));
    }
}
