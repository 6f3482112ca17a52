//! Lets the worker find libtorch and the two CUDA libraries it always loads without any environment variable:
//! `setup/env.sh` names their folders in PANGLOT_RPATH, and they go into the binary's run path.

fn main() {
    println!("cargo::rerun-if-env-changed=PANGLOT_RPATH");
    for folder in std::env::var("PANGLOT_RPATH")
        .unwrap_or_default()
        .split(':')
        .filter(|folder| !folder.is_empty())
    {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
