//! Who may depend on whom.

use serde_json::Value;

use super::Problem;

/// Every edge between the workspace's own packages that is allowed; what is built on an edge is
/// allowed to use it in its tests too.
const EDGES: [(&str, &[&str]); 10] = [
    ("ep-sys", &[]),
    ("ep-sim", &["ep-sys"]),
    ("ep-alloc", &["ep-sys"]),
    ("ep-peers", &["ep-sys"]),
    ("ep-kernels", &[]),
    ("ep-emulation", &["ep-kernels"]),
    ("ep", &["ep-alloc", "ep-kernels", "ep-peers", "ep-sys"]),
    ("ep-cli", &["ep", "ep-sim"]),
    ("ep-benches", &["ep"]),
    ("xtask", &[]),
];

/// The simulator is for tests: anything may use it there, nothing below the binary elsewhere.
const SIMULATOR: &str = "ep-sim";

/// Outside packages that only some may name: the doors to the GPU, and tools of the build.
const RESTRICTED: [(&str, &[&str]); 4] = [
    ("bindgen", &["xtask"]),
    ("cc", &["ep-kernels", "ep-emulation"]),
    ("cudarc", &["ep-sys", "ep-cli", "ep"]),
    ("libloading", &["ep-sys"]),
];

pub(super) fn check(metadata: &Value) -> Vec<Problem> {
    let members = || elements(&metadata["workspace_members"]);
    let packages = || elements(&metadata["packages"]);
    let is_member = |package: &&Value| members().any(|member| *member == package["id"]);
    let names: Vec<_> = packages()
        .filter(is_member)
        .map(|package| &package["name"])
        .collect();

    let mut problems = Vec::new();
    for package in packages().filter(is_member) {
        let from = name(package);
        for dependency in elements(&package["dependencies"]) {
            let to = name(dependency);
            let dev = dependency["kind"] == "dev";
            let allowed = if names.contains(&&dependency["name"]) {
                edge(from, to, dev) && dependency["optional"] != true
            } else {
                outside(from, to)
            };
            if !allowed {
                let rule = format!("may not depend on {to}; xtask/src/tidy/graph.rs has the edges");
                problems.push(Problem::of(from, rule));
            }
        }
        for (feature, enables) in package["features"].as_object().into_iter().flatten() {
            let simulator = |value: &Value| value.as_str().is_some_and(|s| s.contains(SIMULATOR));
            if feature.contains(SIMULATOR) || elements(enables).any(simulator) {
                let rule = format!("feature {feature}: the simulator is never a cargo feature");
                problems.push(Problem::of(from, rule));
            }
        }
    }
    problems.extend(check_cudarc(metadata));
    problems
}

fn edge(from: &str, to: &str, dev: bool) -> bool {
    let allowed = EDGES
        .iter()
        .any(|(package, edges)| *package == from && edges.contains(&to));
    allowed || (dev && to == SIMULATOR)
}

fn outside(from: &str, to: &str) -> bool {
    RESTRICTED
        .iter()
        .all(|(package, users)| *package != to || users.contains(&from))
}

/// cudarc with two CUDA versions does not compile, and with none it asks the build machine.
fn check_cudarc(metadata: &Value) -> Vec<Problem> {
    let is_cudarc = |node: &&Value| {
        elements(&metadata["packages"]).any(|p| p["id"] == node["id"] && p["name"] == "cudarc")
    };
    let mut problems = Vec::new();
    for node in elements(&metadata["resolve"]["nodes"]).filter(is_cudarc) {
        let versions: Vec<_> = elements(&node["features"])
            .filter_map(Value::as_str)
            .filter(|feature| feature.starts_with("cuda-"))
            .collect();
        if versions.len() != 1 {
            let rule = format!("exactly one cuda-* feature is needed, found {versions:?}");
            problems.push(Problem::of("cudarc", rule));
        }
    }
    problems
}

fn elements(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn workspace(dependencies: Value, features: Value, cudarc: Value) -> Value {
        json!({
            "workspace_members": ["alloc", "sim", "peers"],
            "packages": [
                {"id": "alloc", "name": "ep-alloc", "dependencies": dependencies,
                 "features": features},
                {"id": "sim", "name": "ep-sim", "dependencies": [], "features": {}},
                {"id": "peers", "name": "ep-peers", "dependencies": [], "features": {}},
                {"id": "c", "name": "cudarc", "dependencies": [{"name": "cc", "kind": "build"}]},
            ],
            "resolve": {"nodes": [{"id": "c", "features": cudarc}]},
        })
    }

    fn rules(dependencies: Value, features: Value, cudarc: Value) -> Vec<String> {
        let problems = check(&workspace(dependencies, features, cudarc));
        problems
            .into_iter()
            .map(|problem| problem.to_string())
            .collect()
    }

    #[test]
    fn allowed_edges_are_allowed() {
        let dependencies = json!([
            {"name": "thiserror", "kind": null},
            {"name": "ep-sim", "kind": "dev"},
        ]);
        assert_eq!(
            rules(dependencies, json!({}), json!(["std", "cuda-13000"])),
            [""; 0]
        );
    }

    #[test]
    fn siblings_restricted_packages_and_the_simulator_are_refused() {
        for dependency in [
            json!({"name": "ep-peers", "kind": null}),
            json!({"name": "ep-peers", "kind": "dev"}),
            json!({"name": "ep-sim", "kind": null}),
            json!({"name": "ep-sim", "kind": "dev", "optional": true}),
            json!({"name": "cudarc", "kind": "dev"}),
        ] {
            let rules = rules(json!([dependency]), json!({}), json!(["cuda-13000"]));
            assert_eq!(rules.len(), 1, "{dependency}: {rules:?}");
        }
    }

    #[test]
    fn the_simulator_is_no_feature() {
        for features in [json!({"ep-sim": []}), json!({"test": ["dep:ep-sim"]})] {
            assert_eq!(rules(json!([]), features, json!(["cuda-13000"])).len(), 1);
        }
    }

    #[test]
    fn cudarc_has_one_cuda_version() {
        for features in [json!(["std"]), json!(["cuda-13000", "cuda-12080"])] {
            assert_eq!(rules(json!([]), json!({}), features).len(), 1);
        }
    }
}
