import Foundation

/// An exported model on this machine: package, tokenizer, adapters and their proof in one folder.
public struct ModelBundle: Sendable {
    /// The folder.
    public let url: URL
    /// Its `metadata.json`.
    public let manifest: Manifest
    /// SHA-256 of the bytes that the manifest was read from.
    let manifestSHA256: String

    /// The Core ML package.
    public var package: URL { place(manifest.mainAsset) }
    /// The folder with `tokenizer.json`.
    public var tokenizerFolder: URL {
        place(manifest.medphi.tokenizer.path).deletingLastPathComponent()
    }
    /// The tokenizer's test vectors.
    public var vectors: URL { place(manifest.medphi.tokenizer.vectors) }
    /// The certificate: what was compared, and how far it differed.
    public var parity: URL { place("parity.json") }
    /// Bytes of all files but the manifest and the list of hashes.
    public var byteCount: Int {
        manifest.medphi.files.reduce(0) { $0.addingReportingOverflow($1.bytes).partialValue }
    }

    /// Name -> pack of each adapter that lies beside the package.
    public var adapters: [String: URL] {
        var found: [String: URL] = [:]
        for entry in manifest.medphi.adapters.list {
            if let path = entry.path { found[entry.name] = place(path) }
        }
        return found
    }

    /// A file of the bundle; the manifest's own paths were checked to stay inside.
    public func place(_ path: String) -> URL { url.appendingPathComponent(path) }

    /// Opens a bundle and checks that every file of it is as it was written.
    ///
    /// - Parameters:
    ///   - url: the `.medphi` folder.
    ///   - check: whether all files are read and their hashes compared; otherwise the manifest alone
    ///     is read.
    ///   - progress: called with the bytes read so far and in all; may throw to stop.
    /// - Throws: `Phi3Error`: no bundle; files altered, missing or not listed, each by its name; links
    ///   or devices inside; a damaged manifest, or one made by a newer version.
    public static func open(
        _ url: URL, check: Bool = true,
        progress: ((_ done: Int, _ total: Int) throws -> Void)? = nil
    ) throws -> ModelBundle {
        try checkFolder(url)
        if !check { return try ModelBundle(unchecked: url) }
        let sums = try BundleSums.read(in: url)
        // The manifest is small: what made the bundle is known before gigabytes are read.
        var bundle: ModelBundle?
        let altered = "\(Manifest.fileName) is altered"
        let unlisted = "\(Manifest.fileName) is not listed"
        let first = try BundleSums.differing(in: url, sums, only: Manifest.fileName)
        if !first.contains(altered), !first.contains(unlisted) {
            bundle = try ModelBundle(agreed: url, sums)
        }
        let lines = try BundleSums.differing(in: url, sums, progress: progress)
        guard lines.isEmpty, let bundle else {
            throw Phi3Error.checksumMismatch(
                ProblemList(
                    path: url.path, what: "files are not as \(BundleSums.fileName) says",
                    problems: lines, advice: "Fetch or export the bundle again."))
        }
        return bundle
    }

    private static func checkFolder(_ url: URL) throws {
        let kind = FileBytes.kind(of: url)
        guard kind == .folder else {
            throw Phi3Error.file(
                ErrorDetails(
                    place: url.path, found: kind == .missing ? "nothing there" : "no folder",
                    expected: "a folder NAME.medphi that export wrote",
                    advice: "Give the folder of the bundle."))
        }
        if FileBytes.kind(of: url.appendingPathComponent(Manifest.fileName)) != .file {
            throw Phi3Error.file(
                ErrorDetails(
                    place: url.path, found: "no \(Manifest.fileName)", expected: "a bundle",
                    advice: "Give the folder NAME.medphi itself, or export it again."))
        }
    }
}

extension ModelBundle {
    /// A bundle of which the manifest alone was read.
    fileprivate init(unchecked url: URL) throws {
        let place = url.appendingPathComponent(Manifest.fileName)
        let data = try FileBytes.read(place, limit: Manifest.mostBytes)
        self.init(
            url: url,
            manifest: try Manifest.parse(try FileBytes.json(data, of: place), place: place.path),
            manifestSHA256: SHA256.hex(data))
    }

    /// A bundle whose manifest is the one that the list of hashes knows, and lists the same files.
    init(agreed url: URL, _ sums: [String: String]) throws {
        try self.init(unchecked: url)
        try ModelBundle.check(manifest, manifestSHA256, url, sums)
    }

    /// The manifest, in agreement with the list of hashes.
    static func agreed(_ url: URL, _ sums: [String: String]) throws -> Manifest {
        try ModelBundle(agreed: url, sums).manifest
    }

    private static func check(
        _ manifest: Manifest, _ sha256: String, _ url: URL, _ sums: [String: String]
    ) throws {
        var others = sums
        var differ: [String] = []
        if others.removeValue(forKey: Manifest.fileName) != sha256 {
            differ.append("\(Manifest.fileName): it is another one")
        }
        for entry in manifest.medphi.files
        where others.removeValue(forKey: entry.path) != entry.sha256 {
            differ.append("\(entry.path): the two do not agree")
        }
        differ += others.keys.map { "\($0): not in the manifest" }
        if !differ.isEmpty {
            throw Phi3Error.checksumMismatch(
                ProblemList(
                    path: url.path,
                    what: "\(Manifest.fileName) and \(BundleSums.fileName) disagree",
                    problems: differ, advice: "Fetch or export the bundle again."))
        }
    }
}
