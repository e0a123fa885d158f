import Foundation

/// Bundles on this machine: fetched once, checked byte for byte, and swapped as a whole.
///
/// Every bundle is a folder `NAME.medphi` that `Phi3.load` takes. What is being fetched lies beside
/// it until all of it is here and every hash is right; an interrupted installation goes on where it
/// stopped. The version before stays, for `rollback(_:)`. The network is used by `install` alone, and
/// only where the options allow it.
///
/// ```swift
/// let store = try BundleStore(options: StoreOptions(allowsNetwork: true))
/// let bundle = try await store.install("notes", from: address)
/// let model = try await Phi3.load(bundle.url)
/// ```
public actor BundleStore {
    /// The folder that holds the bundles.
    public nonisolated let folder: URL
    private let transport: any FileTransport
    private let options: StoreOptions
    private let disk: StoreDisk
    private var busy: Set<String> = []
    private var waiting: [String: [(id: UUID, resume: CheckedContinuation<Void, any Error>)]] = [:]

    /// Opens a store.
    ///
    /// - Parameters:
    ///   - folder: where bundles lie; `nil`: `MedPhiKit` in the user's Application Support.
    ///   - options: whether the network is allowed, and how it is used.
    ///   - transport: what fetches files.
    /// - Throws: `Phi3Error`: no such folder can be made, or an option is out of range.
    public init(
        folder: URL? = nil, options: StoreOptions = .init(),
        transport: any FileTransport = URLSessionTransport()
    ) throws {
        try self.init(folder: folder, options: options, transport: transport, disk: .system)
    }

    init(
        folder: URL?, options: StoreOptions, transport: any FileTransport, disk: StoreDisk
    ) throws {
        try options.validate()
        self.folder = try folder ?? BundleStore.usualFolder()
        self.options = options
        self.transport = transport
        self.disk = disk
        do {
            try FileManager.default.createDirectory(
                at: self.folder, withIntermediateDirectories: true)
        } catch {
            throw Phi3Error.notWritten(
                path: self.folder.path, reason: FileBytes.reason(of: error))
        }
        #if canImport(Darwin)
            // What can be fetched again has no place in a backup.
            var values = URLResourceValues()
            values.isExcludedFromBackup = true
            var marked = self.folder
            try? marked.setResourceValues(values)
        #endif
    }

    /// `MedPhiKit` in the user's Application Support.
    public static func usualFolder() throws -> URL {
        let places = FileManager.default.urls(
            for: .applicationSupportDirectory, in: .userDomainMask)
        guard let place = places.first else {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "the folder of the store", found: "no Application Support folder",
                    expected: "a folder to keep bundles in", advice: "Give a folder."))
        }
        return place.appendingPathComponent("MedPhiKit", isDirectory: true)
    }

    /// Every installed bundle, by name.
    public func list() throws -> [InstalledBundle] {
        let names: [String]
        do {
            names = try FileManager.default.contentsOfDirectory(atPath: folder.path)
        } catch {
            throw Phi3Error.unreadable(path: folder.path, reason: FileBytes.reason(of: error))
        }
        return names.filter { $0.hasSuffix(".medphi") }.sorted().compactMap { name in
            (try? StoreFolder(name, in: folder))?.installed
        }
    }

    /// A bundle that is installed; `nil`: it is not. Nothing is fetched.
    public func installed(_ name: String) throws -> InstalledBundle? {
        try StoreFolder(name, in: folder).installed
    }

    /// Installs a bundle, or a newer version of one.
    ///
    /// `SHA256SUMS` comes first; where it is the installed version's, and that has every listed file in
    /// its size, nothing else is fetched. Files that an installed version already has are taken from
    /// there, so that a damaged bundle is repaired by what is damaged alone. Bytes that changed and
    /// left a file's size as it was are found by `verifying`, and by `Phi3.load`, whose error then asks
    /// for such a repair.
    ///
    /// - Parameters:
    ///   - name: what to install it as.
    ///   - address: its folder on a server: https, or http on this machine.
    ///   - version: the SHA-256 of the `SHA256SUMS` that must come, where the app knows it. Without
    ///     it the bundle is as trustworthy as the server.
    ///   - verifying: whether every byte of the installed version is read before it is taken as it is.
    ///   - progress: is told what goes on.
    /// - Throws: `Phi3Error`, or `CancellationError`. What was installed before is unchanged, and
    ///   what came so far is kept.
    public func install(
        _ name: String, from address: URL, version: String? = nil, verifying: Bool = false,
        progress: (@Sendable (InstallEvent) -> Void)? = nil
    ) async throws -> InstalledBundle {
        let place = try StoreFolder(name, in: folder)
        if let version, let here = try place.whole(version, hashing: verifying) { return here }
        try allow(address, version)
        return try await alone(place) {
            try await install(place, from: address, version: version, verifying) { progress?($0) }
        }
    }

    private func allow(_ address: URL, _ version: String?) throws {
        if let version, !isSHA256(version) {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "version", found: "'\(printable(version))'",
                    expected: "the SHA-256 of a SHA256SUMS, in 64 hexadecimal digits",
                    advice: "Run sha256sum SHA256SUMS in the bundle."))
        }
        guard options.allowsNetwork else {
            throw Phi3Error.networkDisabled(
                ErrorDetails(
                    place: FileAddress.shown(address), found: "the network is not allowed",
                    expected: "StoreOptions(allowsNetwork: true) to fetch a bundle",
                    advice: "Allow it, or put the bundle into the app's files."))
        }
        if let problem = FileAddress.problem(address) {
            throw Phi3Error.download(
                ErrorDetails(
                    place: FileAddress.shown(address), found: problem,
                    expected: "https://HOST/PATH/NAME.medphi",
                    advice: "Give the address of the bundle's folder."))
        }
    }

    private func install(
        _ place: StoreFolder, from address: URL, version: String?, _ verifying: Bool,
        _ report: @escaping @Sendable (InstallEvent) -> Void
    ) async throws -> InstalledBundle {
        try place.checkOurs()
        let download = FileDownload(transport: transport, options: options, report: report)
        let work = BundleInstall(
            folder: place, base: address, download: download, disk: disk, report: report)
        let sums = try await work.sums()
        let found = SHA256.hex(sums)
        if let version, version != found {
            throw Phi3Error.download(
                ErrorDetails(
                    place: FileAddress.shown(address), found: "version \(found.prefix(16))…",
                    expected: "version \(version.prefix(16))…",
                    advice: "Nothing was installed. The server has another version of the bundle."))
        }
        if let here = try place.whole(found, hashing: verifying) { return here }
        let pieces = try await work.pieces(sums)
        try await work.fetch(pieces)
        try Task.checkCancellation()
        try work.assemble(pieces)
        // A version that is damaged is no version to go back to, and takes no other one's place.
        let isDamaged = try place.installed?.version == found || !place.isWhole(hashing: false)
        try place.remember()
        try isDamaged ? place.replace(place.assembled) : place.use(place.assembled)
        try? place.remove(place.arriving)
        guard let here = place.installed else { throw place.missing }
        return here
    }

    /// Puts the version before back in use; the one in use becomes the version before.
    ///
    /// - Throws: `Phi3Error`: there is none, or its files are altered; nothing is changed then.
    @discardableResult
    public func rollback(_ name: String) async throws -> InstalledBundle {
        let place = try StoreFolder(name, in: folder)
        return try await alone(place) {
            guard FileBytes.kind(of: place.previous) == .folder else {
                throw Phi3Error.file(
                    ErrorDetails(
                        place: place.current.path, found: "no version before this one",
                        expected: "two installed versions", advice: "Install the one you want."))
            }
            _ = try ModelBundle.open(place.previous)
            try place.rollback()
            guard let here = place.installed else { throw place.missing }
            return here
        }
    }

    /// Removes a bundle with its version before and whatever was fetched of another.
    public func remove(_ name: String) async throws {
        let place = try StoreFolder(name, in: folder)
        try await alone(place) { try place.removeAll() }
    }

    /// Removes what an interrupted installation left to go on with.
    public func removePartial(_ name: String) async throws {
        let place = try StoreFolder(name, in: folder)
        try await alone(place) { try place.remove(place.arriving) }
    }

    /// Runs one piece of work on a bundle at a time, in the order they were asked for.
    private func alone<Value: Sendable>(
        _ place: StoreFolder, _ body: () async throws -> Value
    ) async throws -> Value {
        try await turn(place.name)
        defer { next(place.name) }
        try Task.checkCancellation()
        let lock = try place.lock()
        defer { lock.close() }
        return try await body()
    }

    private func turn(_ name: String) async throws {
        if busy.insert(name).inserted { return }
        let id = UUID()
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation {
                (resume: CheckedContinuation<Void, any Error>) in
                if Task.isCancelled { return resume.resume(throwing: CancellationError()) }
                waiting[name, default: []].append((id, resume))
            }
        } onCancel: {
            Task { await self.giveUp(name, id) }
        }
    }

    private func giveUp(_ name: String, _ id: UUID) {
        guard let at = waiting[name]?.firstIndex(where: { $0.id == id }) else { return }
        waiting[name]?.remove(at: at).resume.resume(throwing: CancellationError())
    }

    private func next(_ name: String) {
        if waiting[name]?.isEmpty == false {
            waiting[name]?.removeFirst().resume.resume()
        } else {
            waiting[name] = nil
            busy.remove(name)
        }
    }
}
