import Foundation
import Synchronization

/// One installation: what is listed, what of it is here, the rest from the network, and the folder
/// made of it.
struct BundleInstall: Sendable {
    let folder: StoreFolder
    let base: URL
    let download: FileDownload
    let disk: StoreDisk
    let report: @Sendable (InstallEvent) -> Void

    /// One file by its content, and the paths it has in the bundle.
    struct Piece: Sendable {
        let sha256: String
        let bytes: Int
        var paths: [String]
        var path: String { paths[0] }
    }

    /// No bundle has more files, and no file of one is larger, than a disk holds.
    private static let mostSums = 16 << 20

    /// Fetches `SHA256SUMS`.
    func sums() async throws -> Data {
        let url = try address(BundleSums.fileName)
        return try await download.small(
            url, name: BundleSums.fileName, limit: BundleInstall.mostSums)
    }

    /// Fetches the manifest and checks that it and the list say the same, before anything large.
    func pieces(_ sums: Data) async throws -> [Piece] {
        try folder.remove(folder.listing)
        try folder.make(folder.listing)
        try write(sums, BundleSums.fileName)
        let listed = try BundleSums.read(in: folder.listing)
        let manifest = try await download.small(
            address(Manifest.fileName), name: Manifest.fileName, limit: FileBytes.jsonLimit)
        guard SHA256.hex(manifest) == listed[Manifest.fileName] else {
            throw Phi3Error.download(
                ErrorDetails(
                    place: FileAddress.shown(base),
                    found: "\(Manifest.fileName) is not the one that \(BundleSums.fileName) lists",
                    expected: "files of one bundle",
                    advice: "Ask again later: the bundle may just be replaced."))
        }
        try write(manifest, Manifest.fileName)
        let files = try ModelBundle.agreed(folder.listing, listed).medphi.files
        return try collected(files)
    }

    private func collected(_ files: [Manifest.FileEntry]) throws -> [Piece] {
        var pieces: [String: Piece] = [:]
        var total = 0
        for file in files.sorted(by: { $0.path < $1.path }) {
            if var piece = pieces[file.sha256] {
                piece.paths.append(file.path)
                pieces[file.sha256] = piece
                if piece.bytes == file.bytes { continue }
            } else {
                let piece = Piece(sha256: file.sha256, bytes: file.bytes, paths: [file.path])
                pieces[file.sha256] = piece
                let sum = total.addingReportingOverflow(file.bytes)
                total = sum.partialValue
                if !sum.overflow { continue }
            }
            throw Phi3Error.damaged(
                path: FileAddress.shown(base), what: "its manifest names impossible sizes",
                expected: "the sizes of files", advice: "Ask whoever serves the bundle.")
        }
        return pieces.values.sorted { $0.path < $1.path }
    }

    private func write(_ data: Data, _ name: String) throws {
        try AtomicFile.write(
            to: folder.listing.appendingPathComponent(name), replace: true
        ) { try $0.write(data) }
    }

    private func address(_ path: String) throws -> URL {
        guard let url = FileAddress.file(path, of: base) else {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "the address of a bundle", found: "no address that files can be under",
                    expected: "https://HOST/PATH/NAME.medphi",
                    advice: "Give the address of the bundle's folder."))
        }
        return url
    }

    private func place(_ piece: Piece) -> URL {
        folder.arriving.appendingPathComponent(piece.sha256)
    }

    /// Brings every piece here.
    func fetch(_ pieces: [Piece]) async throws {
        try tidy(pieces)
        let here = try pieces.filter { try isHere($0) }
        let due = pieces.filter { piece in !here.contains { $0.sha256 == piece.sha256 } }
        let partial = due.map { min($0.bytes, FileBytes.size(of: PartialFile.partial(place($0)))) }
        let total = pieces.reduce(0) { $0 + $1.bytes }
        let missing = due.reduce(0) { $0 + $1.bytes } - partial.reduce(0, +)
        report(.listed(files: due.count, bytes: missing))
        try checkRoom(missing, pieces)
        var done = here.reduce(0) { $0 + $1.bytes }
        for piece in due {
            let before = done
            let file = try PartialFile(place(piece), expected: piece.bytes, disk: disk)
            try await download.large(
                try address(piece.path), path: piece.path, sha256: piece.sha256, into: file
            ) { [report] count in
                report(.receiving(path: piece.path, done: before + count, total: total))
            }
            done += piece.bytes
        }
    }

    /// Throws away what belongs to a version that is not asked for any more.
    private func tidy(_ pieces: [Piece]) throws {
        try folder.remove(folder.assembled)
        let wanted = Set(pieces.map(\.sha256))
        let names =
            (try? FileManager.default.contentsOfDirectory(atPath: folder.arriving.path)) ?? []
        for name in names where name != folder.listing.lastPathComponent {
            if wanted.contains(String(name.prefix(64))) { continue }
            try folder.remove(folder.arriving.appendingPathComponent(name))
        }
    }

    /// Whether a piece is here: from an interrupted installation, or from an installed version.
    private func isHere(_ piece: Piece) throws -> Bool {
        try Task.checkCancellation()
        if try isRight(place(piece), piece) { return true }
        try folder.remove(place(piece))
        for version in [folder.current, folder.previous] {
            // Of a damaged version the list may be missing, and one of two equal files be right.
            let sums = (try? BundleSums.read(in: version)) ?? [:]
            let paths = Set(sums.filter { $0.value == piece.sha256 }.keys).union(piece.paths)
            for path in paths.sorted() {
                let own = version.appendingPathComponent(path)
                guard try isRight(own, piece) else { continue }
                try link(own, place(piece))
                return true
            }
        }
        return false
    }

    private func isRight(_ url: URL, _ piece: Piece) throws -> Bool {
        // A link would be linked to, and a bundle has none.
        guard !FileBytes.isLink(url.path), FileBytes.kind(of: url) == .file,
            FileBytes.size(of: url) == piece.bytes
        else { return false }
        do {
            return try hash(url) == piece.sha256
        } catch is Phi3Error {
            // What cannot be read, on a disk with bad sectors too, is fetched again.
            return false
        }
    }

    private func hash(_ url: URL) throws -> String {
        try SHA256.hex(contentsOf: url) { _ in try Task.checkCancellation() }
    }

    /// A second name for the same bytes, or a copy where the disk has no such thing.
    private func link(_ from: URL, _ to: URL) throws {
        if systemLink(from.path, to.path) == 0 { return }
        do {
            try FileManager.default.copyItem(at: from, to: to)
        } catch {
            throw Phi3Error.notWritten(path: to.path, reason: FileBytes.reason(of: error))
        }
    }

    private func checkRoom(_ missing: Int, _ pieces: [Piece]) throws {
        guard let free = disk.free(folder.arriving) else { return }
        // Files that lie twice in the bundle are copied where links are not possible; the rest of
        // the machine needs some room too.
        let spare = 16 << 20
        let needed = missing.addingReportingOverflow(spare)
        guard !needed.overflow, needed.partialValue <= free else {
            throw Phi3Error.file(
                ErrorDetails(
                    place: folder.root.path, found: "\(free) bytes are free",
                    expected: "\(missing) for the bundle and \(spare) to spare",
                    advice: "Make room, then install again."))
        }
    }

    /// Makes the folder of the bundle from its pieces.
    func assemble(_ pieces: [Piece]) throws {
        report(.installing)
        let target = folder.assembled
        try folder.remove(target)
        try folder.make(target)
        for piece in pieces {
            for path in piece.paths {
                let file = target.appendingPathComponent(path)
                try folder.make(file.deletingLastPathComponent())
                try link(place(piece), file)
            }
        }
        for name in [BundleSums.fileName, Manifest.fileName] {
            try link(
                folder.listing.appendingPathComponent(name), target.appendingPathComponent(name))
        }
        let folders = Set(
            pieces.flatMap(\.paths).map { path in
                target.appendingPathComponent(path).deletingLastPathComponent().path
            })
        for folder in folders { StoreFolder.sync(URL(fileURLWithPath: folder)) }
        let odd = try BundleSums.files(in: target).count - pieces.reduce(1) { $0 + $1.paths.count }
        guard odd == 0 else {
            throw Phi3Error.damaged(
                path: FileAddress.shown(base), what: "paths of its files cannot lie side by side",
                expected: "paths for every kind of disk", advice: "Ask whoever serves the bundle.")
        }
    }
}

private func systemLink(_ from: String, _ to: String) -> Int32 { link(from, to) }
