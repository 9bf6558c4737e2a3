//! Licences of everything that is linked or run by the build.

use serde_json::Value;

use super::Problem;

/// Permissive licences; `deny.toml` has the same list.
const ALLOWED: [&str; 10] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

pub(super) fn check(metadata: &Value) -> Vec<Problem> {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let refused = packages.filter(|package| {
        let expression = package["license"].as_str().unwrap_or_default();
        !allowed(expression)
    });
    refused
        .map(|package| {
            let name = package["name"].as_str().unwrap_or_default();
            Problem::of(
                name,
                format!("licence {} is not on the list", package["license"]),
            )
        })
        .collect()
}

/// Evaluates an SPDX expression: `A OR B` needs one of them, `A AND B` both. The old `A/B` means OR,
/// and `A WITH exception` only permits more than A.
fn allowed(expression: &str) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut tokens = spaced.split_whitespace().peekable();
    any(&mut tokens) == Some(true) && tokens.next().is_none()
}

type Tokens<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(tokens: &mut Tokens<'_>) -> Option<bool> {
    let mut value = all(tokens)?;
    while tokens.next_if_eq(&"OR").is_some() {
        value |= all(tokens)?;
    }
    Some(value)
}

fn all(tokens: &mut Tokens<'_>) -> Option<bool> {
    let mut value = one(tokens)?;
    while tokens.next_if_eq(&"AND").is_some() {
        value &= one(tokens)?;
    }
    Some(value)
}

fn one(tokens: &mut Tokens<'_>) -> Option<bool> {
    let token = tokens.next()?;
    if token == "(" {
        let value = any(tokens)?;
        return tokens.next_if_eq(&")").map(|_| value);
    }
    if tokens.next_if_eq(&"WITH").is_some() {
        tokens.next()?;
    }
    Some(ALLOWED.contains(&token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_evaluated() {
        for expression in [
            "MIT",
            "MIT/Apache-2.0",
            "MIT OR GPL-3.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(allowed(expression), "{expression}");
        }
        for expression in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT",
            "MIT Apache-2.0",
            "MIT OR",
        ] {
            assert!(!allowed(expression), "{expression}");
        }
    }

    #[test]
    fn a_package_without_a_licence_is_reported() {
        let metadata = serde_json::json!({"packages": [
            {"name": "fine", "license": "ISC"},
            {"name": "secret", "license": null},
        ]});
        let places: Vec<_> = check(&metadata)
            .into_iter()
            .map(|problem| problem.place)
            .collect();
        assert_eq!(places, ["secret"]);
    }
}
