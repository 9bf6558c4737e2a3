//! The lines of JSON that `ep perf` and other libraries' benchmarks print.

use std::fmt;

use serde_json::Value;

use crate::repo::Result;

/// Times of one library at one number of tokens.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) shape: Shape,
    pub(super) lib: String,
    /// Per rank.
    pub(super) tokens: u64,
    pub(super) dispatch: Time,
    pub(super) combine: Time,
    pub(super) empty_us: Option<f64>,
    /// File and line.
    pub(super) place: String,
}

/// Microseconds of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Time {
    pub(super) median: f64,
    pub(super) p99: Option<f64>,
    pub(super) floor: Option<f64>,
}

/// What has to be the same for times to be comparable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    ranks: u64,
    hidden: u64,
    experts: u64,
    top_k: u64,
    fp8: bool,
    routing: String,
    graph: bool,
    /// Whether the weights come with combine and not with dispatch.
    weights_at_combine: bool,
    simulated: bool,
}

/// Reads a file; a line that is no measurement is an error, an empty one is not.
pub(super) fn read(file: &str, text: &str) -> Result<Vec<Measured>> {
    text.lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty())
        .map(|(line, number)| {
            let place = format!("{file}:{number}");
            let at_place = |problem| format!("{place}: {problem}").into();
            measured(line, &place).map_err(at_place)
        })
        .collect()
}

fn measured(line: &str, place: &str) -> Result<Measured, String> {
    let json: Value = serde_json::from_str(line).map_err(|error| {
        format!(
            "this is no JSON, from column {} on; leave the line out",
            error.column()
        )
    })?;
    let fields = Fields(&json);
    let time = |operation| -> Result<Time, String> {
        let time = |what: &str| fields.microseconds(&format!("{operation}{what}_us"));
        let median = time("")?.filter(|&median| median > 0.0);
        Ok(Time {
            median: median.ok_or_else(|| format!("there is no time in {operation}_us"))?,
            p99: time("_p99")?,
            floor: time("_floor")?,
        })
    };
    Ok(Measured {
        shape: Shape {
            ranks: fields.count("ranks")?,
            hidden: fields.count("hidden")?,
            experts: fields.count("experts")?,
            top_k: fields.count("topk")?,
            fp8: fields
                .optional("fp8", Value::as_bool)?
                .ok_or("there is no fp8")?,
            // Benchmarks that have no choice of these do not print them.
            routing: fields
                .optional("routing", word)?
                .unwrap_or("uniform")
                .to_owned(),
            graph: fields.optional("graph", Value::as_bool)?.unwrap_or(false),
            weights_at_combine: fields.optional("weights", Value::as_str)? == Some("combine"),
            simulated: fields.optional("backend", Value::as_str)? == Some("sim"),
        },
        lib: fields
            .optional("lib", Value::as_str)?
            .ok_or("there is no lib")?
            .to_owned(),
        tokens: fields.count("tokens")?,
        dispatch: time("dispatch")?,
        combine: time("combine")?,
        empty_us: fields.microseconds("empty_us")?,
        place: place.to_owned(),
    })
}

/// The fields of a line; others than those asked for do not matter.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Value);

impl<'a> Fields<'a> {
    fn optional<T>(
        self,
        field: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.0.get(field) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(format!("{field} cannot be {value}")),
        }
    }

    fn count(self, field: &str) -> Result<u64, String> {
        let count = |value: &Value| value.as_u64().filter(|&count| count > 0);
        self.optional(field, count)?
            .ok_or_else(|| format!("there is no {field}"))
    }

    fn microseconds(self, field: &str) -> Result<Option<f64>, String> {
        self.optional(field, |value| value.as_f64().filter(|&us| us >= 0.0))
    }
}

/// What can be part of a file's name.
fn word(value: &Value) -> Option<&str> {
    let in_words = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    value.as_str().filter(|word| word.chars().all(in_words))
}

impl Shape {
    /// One word for each field.
    pub(super) fn words(&self) -> [String; 9] {
        let Self {
            ranks,
            hidden,
            experts,
            top_k,
            fp8,
            routing,
            graph,
            weights_at_combine,
            simulated,
        } = self;
        let either = |which, yes: &str, no: &str| if which { yes } else { no }.to_owned();
        [
            format!("{ranks}ranks"),
            format!("hidden{hidden}"),
            format!("{experts}experts"),
            format!("top{top_k}"),
            either(*fp8, "fp8", "bf16"),
            routing.clone(),
            either(*graph, "graph", "stream"),
            either(*weights_at_combine, "late-weights", "weights"),
            either(*simulated, "sim", "gpu"),
        ]
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ranks, hidden {}, {} experts, top-{}, {} dispatch, {} routing",
            self.ranks,
            self.hidden,
            self.experts,
            self.top_k,
            if self.fp8 { "FP8" } else { "BF16" },
            self.routing
        )?;
        if self.graph {
            f.write_str(", CUDA graph")?;
        }
        if self.weights_at_combine {
            f.write_str(", weights with combine")?;
        }
        if self.simulated {
            f.write_str(", simulated")?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// As `ep perf` prints it.
    pub(in crate::bench) const US: &str = concat!(
        r#"{"lib":"ep","ranks":4,"tokens":8,"hidden":7168,"experts":256,"topk":8,"fp8":true,"#,
        r#""routing":"uniform","graph":false,"dispatch_us":11.8,"combine_us":9.7,"#,
        r#""dispatch_p99_us":12.2,"combine_p99_us":10.1,"dispatch_wire_gbs":12.02,"#,
        r#""combine_wire_gbs":28.06,"dispatch_floor_us":0.42,"combine_floor_us":0.8,"sms":132,"#,
        r#""empty_us":4.6,"weights":"dispatch","backend":"cuda","alloc":"malloc","iters":100}"#
    );
    /// As a script that times another library prints it.
    pub(in crate::bench) const PEER: &str = concat!(
        r#"{"lib": "deepep_v2", "ranks": 4, "tokens": 8, "hidden": 7168, "experts": 256, "#,
        r#""topk": 8, "fp8": true, "dispatch_us": 40.1, "combine_us": 31.0, "#,
        r#""dispatch_min_us": 38.0, "combine_min_us": 29.9, "dispatch_gbs": 11.8, "#,
        r#""combine_gbs": 29.6, "rel_err": null}"#
    );

    #[test]
    fn a_line_with_less_in_it_is_of_the_same_shape() {
        let [us, peer] = &read("a", &format!("{US}\n\n{PEER}\n")).unwrap()[..] else {
            panic!("two lines are two measurements");
        };
        assert_eq!(us.shape, peer.shape);
        assert_eq!(
            us.shape.to_string(),
            "4 ranks, hidden 7168, 256 experts, top-8, FP8 dispatch, uniform routing"
        );
        assert_eq!((us.lib.as_str(), us.tokens), ("ep", 8));
        assert_eq!((us.dispatch.median, us.combine.median), (11.8, 9.7));
        assert_eq!((us.dispatch.p99, us.combine.p99), (Some(12.2), Some(10.1)));
        assert_eq!(us.combine.floor, Some(0.8));
        assert_eq!(us.empty_us, Some(4.6));
        assert_eq!(
            (peer.lib.as_str(), peer.place.as_str()),
            ("deepep_v2", "a:3")
        );
        assert_eq!((peer.dispatch.median, peer.dispatch.p99), (40.1, None));
        assert_eq!((peer.combine.floor, peer.empty_us), (None, None));
    }

    #[test]
    fn what_is_no_measurement_is_refused_with_its_place() {
        for (was, is, problem) in [
            (
                US,
                "FAILED nccl rank 0",
                "this is no JSON, from column 1 on",
            ),
            (US, "[]", "there is no "),
            (r#""tokens":8,"#, "", "there is no tokens"),
            (r#""tokens":8,"#, r#""tokens":0,"#, "tokens cannot be 0"),
            (r#""ranks":4"#, r#""ranks":"4""#, "ranks cannot be \"4\""),
            (r#""fp8":true,"#, "", "there is no fp8"),
            ("11.8", "null", "dispatch_us cannot be null"),
            ("9.7", "0", "there is no time in combine_us"),
            ("12.2", "-1", "dispatch_p99_us cannot be -1"),
            ("uniform", "../x", "routing cannot be \"../x\""),
        ] {
            let text = format!("{PEER}\n{}\n", US.replace(was, is));
            let error = read("some.jsonl", &text).unwrap_err().to_string();
            let expected = format!("some.jsonl:2: {problem}");
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}
