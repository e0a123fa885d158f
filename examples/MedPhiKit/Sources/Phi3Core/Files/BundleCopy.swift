import Foundation

extension ModelBundle {
    /// Copies the bundle, with an adapter more where one is given that it does not have.
    ///
    /// Every file is hashed on its way, so that no altered one is passed on. The new bundle appears
    /// complete or not at all, and is one that `open` accepts. A task that is cancelled stops between
    /// two pieces of a file and leaves nothing behind. Its certificate and its README speak of
    /// the adapters it was exported with; the manifest lists all of them.
    ///
    /// - Parameters:
    ///   - url: where; the name should end in `.medphi`.
    ///   - adapter: what to add; an adapter of the bundle itself is there already.
    ///   - replace: whether a bundle that is there is replaced; anything else never is.
    /// - Throws: `Phi3Error`: something in the way, files that are altered, an adapter that cannot be
    ///   added, a full disk; `CancellationError`.
    public func copy(
        to url: URL, adding adapter: BoundAdapter? = nil, replace: Bool = false
    ) throws {
        try checkPlace(url, replace)
        let added = try adapter.flatMap { isOwn($0) ? nil : try addition($0) }
        try FolderWriter.write(to: url, replace: replace) { folder in
            for entry in manifest.medphi.files {
                try copy(entry.path, sha256: entry.sha256, into: folder.url)
            }
            if let added {
                try write(added, into: folder)
            } else {
                try copy(Manifest.fileName, sha256: manifestSHA256, into: folder.url)
                try AtomicFile.copy(
                    place(BundleSums.fileName),
                    to: folder.url.appendingPathComponent(BundleSums.fileName))
            }
            // What would be refused when it is opened is not written. The files' own hashes are known.
            _ = try ModelBundle(agreed: folder.url, BundleSums.read(in: folder.url))
        }
    }

    private struct Addition {
        let name: String
        let adapter: Adapter
        var path: String { "adapters/\(name).safetensors" }
    }

    private func isOwn(_ bound: BoundAdapter) -> Bool {
        guard let adapter = bound.adapter else { return true }
        let place = FileBytes.realPath(of: adapter.url)
        if adapters.values.contains(where: { FileBytes.realPath(of: $0) == place }) { return true }
        // A pack of the bundle that was saved by itself comes back as another file.
        guard let pack = adapters[bound.id.name], let same = try? Adapter.read(pack) else {
            return false
        }
        return same.effectSHA256 == bound.id.sha256
    }

    /// An adapter that may be added, under a name that is free.
    private func addition(_ bound: BoundAdapter) throws -> Addition? {
        guard let adapter = bound.adapter else { return nil }
        func refused(_ problem: String, _ advice: String) -> Phi3Error {
            .adapterIncompatible(
                ProblemList(
                    path: adapter.url.path, what: "cannot be added to \(url.lastPathComponent)",
                    problems: [problem], advice: advice))
        }
        let own = manifest.medphi.adapters
        guard own.mode == .slots else {
            throw refused(
                "the bundle has no adapter slots",
                "Export it with slots (mlx_medphi export --adapters slots).")
        }
        let name = bound.id.name
        guard AdapterNames.isPossible(name) else {
            throw refused(
                "'\(printable(name))' is no name for an adapter",
                "Call the file by letters, digits, _ and -, a letter first, at most 64.")
        }
        if let other = own.list.first(where: { AdapterNames.isSame($0.name, name) }) {
            throw refused(
                "the bundle has another adapter '\(other.name)'", "Give the file another name.")
        }
        return Addition(name: name, adapter: adapter)
    }

    private func copy(_ path: String, sha256: String, into folder: URL) throws {
        let target = folder.appendingPathComponent(path)
        try Self.makeFolder(target.deletingLastPathComponent())
        var hash = SHA256()
        try AtomicFile.write(to: target, replace: false) { writer in
            try FileBytes.pieces(of: place(path)) { bytes in
                try Task.checkCancellation()
                hash.update(bytes)
                try writer.write(bytes)
            }
        }
        if hash.hexDigest() != sha256 { throw altered(path) }
    }

    private func altered(_ path: String) -> Phi3Error {
        .checksumMismatch(
            ProblemList(
                path: url.path, what: "files are not as they were when the bundle was opened",
                problems: ["\(path) is altered"], advice: "Open the bundle again, or fetch it anew."
            ))
    }

    /// The pack, and manifest and hashes that know it.
    private func write(_ added: Addition, into folder: FolderWriter) throws {
        let pack = folder.url.appendingPathComponent(added.path)
        try Self.makeFolder(pack.deletingLastPathComponent())
        try SlotPack.write(added.adapter, name: added.name, for: manifest, to: pack)
        let sha256 = try SHA256.hex(contentsOf: pack)
        let text = try manifestText(added, sha256: sha256, bytes: FileBytes.size(of: pack))
        try folder.write(Data(text.utf8), name: Manifest.fileName)
        var sums = manifest.medphi.files.map { ($0.path, $0.sha256) }
        sums.append((added.path, sha256))
        sums.append((Manifest.fileName, SHA256.hex(Data(text.utf8))))
        sums.sort { $0.0.utf8.lexicographicallyPrecedes($1.0.utf8) }
        let lines = sums.map { "\($0.1)  \($0.0)\n" }.joined()
        try folder.write(Data(lines.utf8), name: BundleSums.fileName)
    }

    /// The manifest's own text with one adapter and one file more; other keys stay as they are.
    private func manifestText(_ added: Addition, sha256: String, bytes: Int) throws -> String {
        let source = place(Manifest.fileName)
        let data = try FileBytes.read(source, limit: Manifest.mostBytes)
        if SHA256.hex(data) != manifestSHA256 { throw altered(Manifest.fileName) }
        guard var root = try FileBytes.json(data, of: source).object,
            var ours = root["medphi"]?.object, var adapters = ours["adapters"]?.object,
            let list = adapters["list"]?.array, let files = ours["files"]?.array
        else {
            throw Phi3Error.damaged(
                path: source.path, what: "changed while it was read",
                advice: "Open the bundle again.")
        }
        let entry: JSONValue = [
            "functions": .object(JSONObject()), "name": .string(added.name),
            "path": .string(added.path), "rank": .integer(added.adapter.scaling.rank),
            "sha256": .string(sha256), "training": .object(added.adapter.origin.training),
        ]
        let file: JSONValue = [
            "bytes": .integer(bytes), "path": .string(added.path), "sha256": .string(sha256),
        ]
        adapters["list"] = .array(Self.sorted(list + [entry], by: "name"))
        ours["adapters"] = .object(adapters)
        ours["files"] = .array(Self.sorted(files + [file], by: "path"))
        root["medphi"] = .object(ours)
        return JSONValue.object(root).text(.pretty) + "\n"
    }

    private static func sorted(_ items: [JSONValue], by name: String) -> [JSONValue] {
        items.sorted {
            ($0[name]?.string ?? "").utf8.lexicographicallyPrecedes(($1[name]?.string ?? "").utf8)
        }
    }

    private static func makeFolder(_ url: URL) throws {
        do {
            try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
        } catch {
            throw Phi3Error.notWritten(path: url.path, reason: FileBytes.reason(of: error))
        }
    }

    /// Refuses the bundle itself, what is in it or around it, and to replace what is no bundle.
    private func checkPlace(_ target: URL, _ replace: Bool) throws {
        if target.pathExtension == "safetensors" {
            throw Phi3Error.option(
                ErrorDetails(
                    place: target.path, found: "the name of a single file",
                    expected: "a folder NAME.medphi, which is what a bundle is saved as",
                    advice: "Choose such a name; saveLoRA writes the adapter as a single file."))
        }
        if FileBytes.overlap(target, url) {
            throw Phi3Error.file(
                ErrorDetails(
                    place: target.path, found: "the bundle itself", expected: "another place",
                    advice: "Choose another name."))
        }
        let manifest = target.appendingPathComponent(Manifest.fileName)
        if replace, FileBytes.exists(target.path), FileBytes.kind(of: manifest) != .file {
            throw Phi3Error.notWritten(
                path: target.path, reason: "something else than a bundle is there")
        }
    }
}

/// What adapters of a bundle may be called.
enum AdapterNames {
    // Names that functions and files of a bundle have already.
    private static let reserved: Set<String> = ["base", "decode", "main", "prefill"]

    /// Whether a name can be a file, a part of a function's name and a choice of the app.
    static func isPossible(_ name: String) -> Bool {
        let bytes = Array(name.utf8)
        func isLetter(_ byte: UInt8) -> Bool { (0x61...0x7A).contains(byte | 0x20) }
        guard let first = bytes.first, isLetter(first), bytes.count <= 64 else { return false }
        let marks = [UInt8(ascii: "_"), UInt8(ascii: "-")]
        return !reserved.contains(folded(name))
            && bytes.allSatisfy {
                isLetter($0) || (0x30...0x39).contains($0) || marks.contains($0)
            }
    }

    /// Whether functions or a Mac's disk would take two names for one.
    static func isSame(_ one: String, _ other: String) -> Bool { folded(one) == folded(other) }

    private static func folded(_ name: String) -> String {
        String(name.lowercased().map { $0 == "-" ? "_" : $0 })
    }
}
