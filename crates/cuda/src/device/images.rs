//! The compiled kernels this program carries, and which of them fit a device.

/// cuModuleLoadData reads an image where it lies.
#[repr(C, align(16))]
#[allow(dead_code, reason = "a build without nvcc carries no images")]
struct Aligned<T: ?Sized>(T);

/// One file of `kernels/`, compiled for one architecture.
#[derive(Debug, Clone, Copy)]
pub(super) struct Image {
    pub(super) file: &'static str,
    /// As nvcc names it: `89`, `90a`.
    pub(super) arch: &'static str,
    pub(super) is_ptx: bool,
    pub(super) bytes: &'static [u8],
}

impl Image {
    /// Whether its kernels, which may start before the one before them has ended, then wait for it: code for older
    /// architectures can't, and must not be started early where it runs on a newer one.
    pub(super) fn waits_for_previous_kernels(&self) -> bool {
        matches!(self.number(), Some(90..))
    }

    fn number(&self) -> Option<u32> {
        self.arch.trim_end_matches('a').parse().ok()
    }
}

static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Whether the program was built with kernels at all.
pub(super) fn any() -> bool {
    !IMAGES.is_empty()
}

/// For each file the image that runs best on a device of this compute capability (90 for 9.0): its own code, else the
/// newest that the driver runs there, else PTX.
pub(super) fn for_device(compute_capability: u32) -> Vec<Image> {
    choose(IMAGES, compute_capability)
}

fn choose(images: &[Image], compute_capability: u32) -> Vec<Image> {
    let mut chosen: Vec<(Image, u32)> = Vec::new();
    for image in images {
        let Some(rank) = rank(image, compute_capability) else {
            continue;
        };
        match chosen.iter_mut().find(|(other, _)| other.file == image.file) {
            Some(best) if best.1 < rank => *best = (*image, rank),
            Some(_) => {}
            None => chosen.push((*image, rank)),
        }
    }
    chosen.into_iter().map(|(image, _)| image).collect()
}

/// Higher is better; `None` does not run there.
fn rank(image: &Image, compute_capability: u32) -> Option<u32> {
    let arch = image.number()?;
    match (image.is_ptx, image.arch.ends_with('a')) {
        (true, _) => (arch <= compute_capability).then_some(0),
        // Architecture-specific code runs on that architecture alone.
        (false, true) => (arch == compute_capability).then_some(1000),
        // A cubin runs on later minor versions of its major one.
        (false, false) => (arch / 10 == compute_capability / 10 && arch <= compute_capability).then_some(arch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(arch: &'static str, is_ptx: bool) -> Image {
        Image {
            file: "x.cu",
            arch,
            is_ptx,
            bytes: &[],
        }
    }

    #[test]
    fn a_device_gets_its_own_code_before_older_code_before_ptx() {
        let images = [
            image("89", true),
            image("89", false),
            image("90a", false),
            image("120", false),
        ];
        let chosen = |capability| {
            let chosen = choose(&images, capability);
            chosen.first().map(|image| (image.arch, image.is_ptx))
        };
        assert_eq!(chosen(90), Some(("90a", false)));
        assert_eq!(chosen(89), Some(("89", false)));
        assert_eq!(chosen(121), Some(("120", false)));
        assert_eq!(chosen(100), Some(("89", true)));
        assert_eq!(chosen(86), None);
    }

    #[test]
    fn code_that_cannot_wait_for_what_precedes_it_is_known() {
        let waits = |arch, is_ptx| image(arch, is_ptx).waits_for_previous_kernels();
        assert!(waits("90a", false) && waits("120", false));
        assert!(!waits("89", false) && !waits("89", true));
    }

    #[test]
    fn cubins_name_the_architecture_they_were_compiled_for() {
        let required = option_env!("KERNEL_BUILD") == Some("require");
        assert!(!required || any(), "kernels were required");
        for image in IMAGES.iter().filter(|image| !image.is_ptx) {
            let number: u32 = image
                .arch
                .trim_end_matches('a')
                .parse()
                .expect("an architecture is a number");
            assert_eq!(&image.bytes[..4], b"\x7fELF", "{}", image.file);
            let flags = u32::from_le_bytes(image.bytes[48..52].try_into().expect("four bytes"));
            assert_eq!(flags >> 8 & 0xff, number, "{} for {}", image.file, image.arch);
            assert_eq!(image.bytes.as_ptr() as usize % 16, 0, "{} is aligned", image.file);
        }
    }
}
