import Foundation
import Phi3Core

/// The files of a `.mlpackage`; no path in them is followed out of the package.
struct PackageFiles {
    /// The package.
    let url: URL
    /// The program.
    let model: URL

    private static let version = "1.0.0"
    private static let weights = "@model_path/weights/"
    // Programs name their weights and do not hold them: Phi-3-mini's has three megabytes.
    private static let mostBytes = 256 << 20

    /// Finds the program of a package.
    ///
    /// - Throws: `Phi3Error.modelLoad`: no whole package.
    init(_ url: URL) throws {
        self.url = url
        let manifest = url.appendingPathComponent("Manifest.json")
        let content = try FileBytes.json(manifest, limit: 1 << 20)
        func refused(_ found: String) -> Phi3Error {
            PackageFiles.refused(manifest, found)
        }
        guard content["fileFormatVersion"]?.string == PackageFiles.version else {
            throw refused("not a manifest of version \(PackageFiles.version)")
        }
        guard let root = content["rootModelIdentifier"]?.string,
            let path = content["itemInfoEntries"]?[root]?["path"]?.string
        else { throw refused("names no root model among its items") }
        guard PackageFiles.isPlain(path) else { throw refused("a path that leaves the package") }
        model = url.appendingPathComponent("Data").appendingPathComponent(path)
        try checkInside(model)
    }

    /// The bytes of the program.
    func program() throws -> [UInt8] {
        [UInt8](try FileBytes.read(model, limit: PackageFiles.mostBytes))
    }

    /// The one weight file, mapped.
    ///
    /// - Parameter names: what the program calls it; exactly one name.
    func weights(_ names: Set<String>) throws -> PackageBlobs {
        guard names.count == 1, let name = names.first,
            name.utf8.starts(with: PackageFiles.weights.utf8)
        else {
            throw PackageFiles.refused(model, "names \(names.count) weight files in the package")
        }
        let file = String(name.dropFirst(PackageFiles.weights.count))
        guard PackageFiles.isPlain(file), !file.utf8.contains(UInt8(ascii: "/")) else {
            throw PackageFiles.refused(model, "weights at a path that leaves the package")
        }
        let place = model.deletingLastPathComponent().appendingPathComponent("weights")
            .appendingPathComponent(file)
        try checkInside(place)
        return try PackageBlobs(place)
    }

    /// The error for a file of a package.
    static func refused(_ url: URL, _ found: String) -> Phi3Error {
        .modelLoad(
            ErrorDetails(
                place: url.path, found: found, expected: "a package that mlx_medphi exported",
                advice: "Export the bundle again."))
    }

    /// Links are followed, so where they lead is looked at.
    private func checkInside(_ file: URL) throws {
        guard FileBytes.kind(of: file) == .file else {
            throw PackageFiles.refused(file, "this file of the package is missing")
        }
        guard FileBytes.realPath(of: file).hasPrefix(FileBytes.realPath(of: url) + "/") else {
            throw PackageFiles.refused(file, "a link out of the package")
        }
    }

    private static func isPlain(_ path: String) -> Bool {
        let parts = path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
        return !path.unicodeScalars.contains { $0 == "\\" || $0 == ":" || $0.value < 0x20 }
            && parts.allSatisfy {
                !$0.isEmpty && !$0.elementsEqual(".".utf8) && !$0.elementsEqual("..".utf8)
            }
    }
}

/// `weight.bin`: a header, then for each constant a record and its numbers, all on multiples of 64.
struct PackageBlobs {
    private let file: MappedFile

    private static let alignment = 64
    private static let mark: UInt32 = 0xDEAD_BEEF
    private static let version: UInt32 = 2
    // The codes of the kinds in a record are others than those in a program.
    private static let codes: [PackageProgram.Kind: UInt32] = [
        .float16: 1, .uint8: 3, .int8: 4, .uint4: 11,
    ]

    init(_ url: URL) throws {
        file = try MappedFile(url)
        guard file.data.count >= PackageBlobs.alignment,
            word(4, as: UInt32.self) == PackageBlobs.version
        else {
            throw PackageFiles.refused(
                url, "not a weight file of version \(PackageBlobs.version)")
        }
    }

    /// The bytes of a constant, still mapped.
    ///
    /// - Throws: `Phi3Error.modelLoad`: no whole constant of its kind and shape is there.
    func bytes(_ constant: PackageProgram.Constant, _ name: String) throws -> Data {
        let size = file.data.count
        let step = PackageBlobs.alignment
        guard let at = Int(exactly: constant.offset), at >= step, at % step == 0, at <= size - step
        else { throw refused(name) }
        let start = word(at + 16, as: UInt64.self)
        let count = word(at + 8, as: UInt64.self)
        guard word(at, as: UInt32.self) == PackageBlobs.mark,
            word(at + 4, as: UInt32.self) == PackageBlobs.codes[constant.kind],
            let begin = Int(exactly: start), let length = Int(exactly: count),
            begin % step == 0, begin <= size, length <= size - begin
        else { throw refused(name) }
        var bits = constant.kind.bits
        for extent in constant.shape {
            let product = bits.multipliedReportingOverflow(by: extent)
            if product.overflow { throw refused(name) }
            bits = product.partialValue
        }
        guard bits <= Int.max - 7, (bits + 7) / 8 == length else { throw refused(name) }
        return try file.bytes(begin..<begin + length)
    }

    private func refused(_ name: String) -> Phi3Error {
        PackageFiles.refused(file.url, "no whole constant where \(name) should be")
    }

    private func word<Word: FixedWidthInteger>(_ offset: Int, as type: Word.Type) -> Word {
        file.data.withUnsafeBytes {
            Word(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: Word.self))
        }
    }
}
