//! Functions over slices that use the widest vectors of the processor they run on.

/// Defines a function whose body is compiled for several kinds of vectors, of which the processor's widest are used. No product is
/// fused with a sum, so the bits are the same with all.
///
/// A closure given to `pulp` does not do: the compiler may leave a large one out of line, and then compiles it for the least
/// processor of all. A method that must be inlined is compiled for each.
#[macro_export]
macro_rules! vectorized {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($kind:ident: $bound:path),+>)? ($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$($kind: $bound),+>)? ($($argument: $type),*) -> $result {
            struct Task<T>(T);

            impl $(<$($kind: $bound),+>)? $crate::pulp::WithSimd for Task<($($type,)*)> {
                type Output = $result;

                #[inline(always)]
                fn with_simd<S: $crate::pulp::Simd>(self, _: S) -> $result {
                    let ($($argument,)*) = self.0;
                    $body
                }
            }

            $crate::pulp::Arch::new().dispatch(Task(($($argument,)*)))
        }
    };
}
