import Foundation

/// Where one bundle of a store lies, and how one version takes the place of another.
///
/// `NAME.medphi` is the version in use. Under `.store/NAME`: `previous` is the one before, `moving`,
/// `returning` and `damaged` exist only between two renames, and `arriving` holds what is being fetched.
struct StoreFolder: Sendable {
    let name: String
    let root: URL

    var current: URL { root.appendingPathComponent("\(name).medphi", isDirectory: true) }
    private var own: URL { root.appendingPathComponent(".store/\(name)", isDirectory: true) }
    var previous: URL { own.appendingPathComponent("previous", isDirectory: true) }
    private var moving: URL { own.appendingPathComponent("moving", isDirectory: true) }
    private var returning: URL { own.appendingPathComponent("returning", isDirectory: true) }
    private var damaged: URL { own.appendingPathComponent("damaged", isDirectory: true) }
    /// What is being fetched: files by their hash.
    var arriving: URL { own.appendingPathComponent("arriving", isDirectory: true) }
    /// SHA256SUMS and the manifest of what is being fetched.
    var listing: URL { arriving.appendingPathComponent("listing", isDirectory: true) }
    /// The folder that becomes the bundle.
    var assembled: URL { arriving.appendingPathComponent("bundle", isDirectory: true) }
    /// Says that what is in use was put there by a store, whatever has become of it since.
    private var mark: URL { own.appendingPathComponent("installed") }
    private var lockFile: URL { own.appendingPathComponent("lock") }

    /// - Throws: `Phi3Error.option` for what is no name of a folder.
    init(_ name: String, in root: URL) throws {
        let plain = ManifestChecks.pathProblem(name) == nil && !name.contains("/")
        guard plain, !name.hasPrefix("."), name.utf8.count <= 200 else {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "the name of a bundle", found: "'\(printable(name))'",
                    expected: "a name for a folder, such as notes",
                    advice: "Leave slashes and leading dots out."))
        }
        let short = name.hasSuffix(".medphi") ? String(name.dropLast(7)) : name
        self.name = short.isEmpty ? name : short
        self.root = root
    }

    /// The version in use, as the SHA-256 of its list of hashes.
    func version(of url: URL) -> String? {
        let sums = url.appendingPathComponent(BundleSums.fileName)
        return try? SHA256.hex(contentsOf: sums)
    }

    var installed: InstalledBundle? {
        guard let version = version(of: current) else { return nil }
        let hasPrevious = FileBytes.kind(of: previous) == .folder
        return InstalledBundle(
            name: name, url: current, version: version, hasPrevious: hasPrevious)
    }

    /// The version in use where it is the asked one and nothing of it is damaged.
    func whole(_ version: String, hashing: Bool) throws -> InstalledBundle? {
        guard let here = installed, here.version == version, try isWhole(hashing: hashing) else {
            return nil
        }
        return here
    }

    /// Whether the version in use has every listed file in its size, and no other.
    ///
    /// - Parameter hashing: whether every byte is read and compared too.
    /// - Throws: `CancellationError`.
    func isWhole(hashing: Bool) throws -> Bool {
        do {
            if hashing {
                _ = try ModelBundle.open(current) { _, _ in try Task.checkCancellation() }
                return true
            }
            let sums = try BundleSums.read(in: current)
            let files = try BundleSums.files(in: current)
            guard files.count == sums.count, let manifest = files[Manifest.fileName],
                try SHA256.hex(contentsOf: manifest) == sums[Manifest.fileName]
            else { return false }
            return try ModelBundle.agreed(current, sums).medphi.files.allSatisfy { entry in
                files[entry.path].map { FileBytes.size(of: $0) == entry.bytes } ?? false
            }
        } catch is Phi3Error {
            return false
        }
    }

    /// Refuses to touch what somebody else put in the bundle's place.
    func checkOurs() throws {
        guard FileBytes.exists(current.path), !FileBytes.exists(mark.path) else { return }
        let sums = current.appendingPathComponent(BundleSums.fileName)
        if FileBytes.kind(of: current) == .folder, FileBytes.kind(of: sums) == .file { return }
        throw Phi3Error.file(
            ErrorDetails(
                place: current.path, found: "something that no store installed",
                expected: "nothing, or a bundle", advice: "Move it away, or choose another folder.")
        )
    }

    /// Remembers that what is in use was put there by a store.
    func remember() throws {
        if FileBytes.exists(mark.path) { return }
        try AtomicFile.write(to: mark, replace: true) { _ in }
    }

    /// The error where the bundle is not here.
    var missing: Phi3Error {
        .file(
            ErrorDetails(
                place: current.path, found: "not installed", expected: "an installed bundle",
                advice: "Install it first."))
    }

    /// Makes folders that do not exist.
    func make(_ url: URL) throws {
        do {
            try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
        } catch {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.reason(of: error))
        }
    }

    func remove(_ url: URL) throws {
        guard FileBytes.exists(url.path) else { return }
        do {
            try FileManager.default.removeItem(at: url)
        } catch {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.reason(of: error))
        }
    }

    /// Keeps every other process, and every other store of this one, from changing the bundle.
    ///
    /// - Returns: what holds the bundle until it is closed.
    func lock() throws -> StoreLock {
        try make(own)
        let descriptor = open(lockFile.path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o644)
        guard descriptor >= 0 else {
            throw Phi3Error.notWritten(path: lockFile.path, reason: FileBytes.lastError())
        }
        let lock = StoreLock(descriptor: descriptor)
        guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
            lock.close()
            throw Phi3Error.file(
                ErrorDetails(
                    place: current.path, found: "another process is installing it",
                    expected: "one at a time", advice: "Wait for it, then ask again."))
        }
        do {
            try recover()
        } catch {
            lock.close()
            throw error
        }
        return lock
    }

    /// Ends what was interrupted between two renames; either version is then whole.
    private func recover() throws {
        if FileBytes.exists(damaged.path) {
            if FileBytes.exists(current.path) {
                try remove(damaged)
            } else {
                try rename(damaged, current)
            }
        }
        if FileBytes.exists(moving.path) {
            if FileBytes.exists(current.path) {
                try remove(previous)
                try rename(moving, previous)
            } else {
                try rename(moving, current)
            }
        }
        if FileBytes.exists(returning.path), !FileBytes.exists(previous.path) {
            try rename(returning, previous)
        }
    }

    /// Puts the version before back in use.
    func rollback() throws {
        // It must have another name while the two change places.
        try rename(previous, returning)
        try use(returning)
    }

    /// Puts a folder in the place of the version in use, which becomes the previous one.
    func use(_ url: URL) throws { try take(url, aside: moving) }

    /// Puts a folder in the place of the version in use, which is thrown away.
    func replace(_ url: URL) throws { try take(url, aside: damaged) }

    private func take(_ url: URL, aside: URL) throws {
        if FileBytes.exists(current.path) { try rename(current, aside) }
        do {
            try rename(url, current)
        } catch {
            try recover()
            throw error
        }
        try recover()
    }

    private func rename(_ from: URL, _ to: URL) throws {
        guard systemRename(from.path, to.path) == 0 else {
            throw Phi3Error.notWritten(path: to.path, reason: FileBytes.lastError())
        }
        for folder in [from, to] { StoreFolder.sync(folder.deletingLastPathComponent()) }
    }

    /// Forces the names in a folder to the disk.
    static func sync(_ folder: URL) {
        let descriptor = open(folder.path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return }
        fsync(descriptor)
        close(descriptor)
    }

    /// Removes the bundle with everything that belongs to it.
    func removeAll() throws {
        try remove(current)
        try remove(previous)
        try remove(arriving)
    }
}

/// Holds a bundle for one piece of work.
struct StoreLock {
    fileprivate let descriptor: Int32

    func close() { systemClose(descriptor) }
}

private func systemClose(_ descriptor: Int32) { close(descriptor) }

private func systemRename(_ from: String, _ to: String) -> Int32 { rename(from, to) }
