import Foundation
import Phi3Core
import Phi3Reference
import Synchronization

/// One function of a package.
struct PackageFunction {
    let name: String
    /// What it takes, gives and keeps, as the package itself says.
    let signature: Manifest.Signature
    /// The model it computes with; without what is in adapter slots.
    let model: ReferenceModel
    /// The adapter that is built in.
    let adapter: String?
    /// Ids that one call reads.
    let width: Int
}

/// A compiled package: a folder with the bundle's manifest and the package in its place.
///
/// Its weights are read out of the package. A test's own package may hold a checkpoint instead, in
/// `Data/checkpoint`, built-in adapters by their names in `Data/adapters`, and in
/// `Data/functions.json` what its functions are, so that a manifest can be found to lie.
final class CompiledPackage: Sendable {
    let url: URL
    let bundle: ModelBundle
    let bench: TestBench
    private let base: ReferenceModel
    private let hasCheckpoint: Bool
    private let signatures: [String: Manifest.Signature]

    var manifest: Manifest { bundle.manifest }
    var defaultFunction: String { manifest.medphi.coreml.defaultFunction }

    private static let origin = "origin.txt"

    private init(_ url: URL) throws {
        guard FileBytes.kind(of: url) == .folder, url.pathExtension == "mlmodelc" else {
            throw failure(3, "\(url.lastPathComponent) is no compiled model")
        }
        self.url = url
        bundle = try ModelBundle.open(url, check: false)
        let path = try FileBytes.read(
            url.appendingPathComponent(CompiledPackage.origin), limit: 1 << 16)
        bench = TestBench.of(package: URL(fileURLWithPath: String(decoding: path, as: UTF8.self)))
        let checkpoint = CompiledPackage.checkpoint(bundle)
        hasCheckpoint = checkpoint != nil
        base = try checkpoint.map { try ReferenceModel.load($0) } ?? ReferenceModel(bundle)
        let own = bundle.package.appendingPathComponent("Data/functions.json")
        if FileBytes.kind(of: own) == .file {
            // Read by the manifest's own reader.
            var changed = try FileBytes.json(url.appendingPathComponent(Manifest.fileName))
            changed = CompiledPackage.replacing(changed, try FileBytes.json(own))
            signatures = try Manifest.parse(changed).medphi.coreml.functions
        } else {
            signatures = bundle.manifest.medphi.coreml.functions
        }
    }

    /// A compiled package, read once for all of its functions.
    static func open(_ url: URL) throws -> CompiledPackage {
        let path = url.standardizedFileURL.path
        if let there = all.withLock({ $0[path]?.package }) { return there }
        let package: CompiledPackage
        do {
            package = try CompiledPackage(url)
        } catch let error as Phi3Error {
            throw failure(3, error.description)  // Apple's knows no errors of this package.
        }
        all.withLock { $0[path] = Weak(package: package) }
        return package
    }

    private struct Weak: Sendable {
        weak let package: CompiledPackage?
    }

    private static let all = Mutex<[String: Weak]>([:])

    private static func checkpoint(_ bundle: ModelBundle) -> URL? {
        let checkpoint = bundle.package.appendingPathComponent("Data/checkpoint")
        return FileBytes.kind(of: checkpoint) == .folder ? checkpoint : nil
    }

    private static func replacing(_ manifest: JSONValue, _ functions: JSONValue) -> JSONValue {
        guard var root = manifest.object, var ours = root["medphi"]?.object,
            var coreml = ours["coreml"]?.object
        else { return manifest }
        coreml["functions"] = functions
        ours["coreml"] = .object(coreml)
        root["medphi"] = .object(ours)
        return .object(root)
    }

    func function(_ name: String) throws -> PackageFunction {
        guard let signature = signatures[name],
            let width = signature.inputs.first(where: { $0.name == "inputIds" })?.shape.last
        else { throw failure(3, "the package has no function \(name)") }
        var model = base
        let entry = manifest.medphi.adapters.list.first { $0.functions.values.contains(name) }
        if let entry {
            let folder = bundle.package.appendingPathComponent("Data/adapters/\(entry.name)")
            let options = AdapterOptions(allowsUnstatedBase: true)
            model =
                hasCheckpoint
                ? try base.applyLoRA(folder, options: options)
                : try base.applying(builtIn: entry.name, of: bundle)
        }
        return PackageFunction(
            name: name, signature: signature, model: model, adapter: entry?.name, width: width)
    }

    /// Copies a package and the manifest of its bundle into a new folder.
    static func compile(_ package: URL) async throws -> URL {
        try await TestBench.of(package: package).willCompile()
        var folder = package.deletingLastPathComponent()
        var path = package.lastPathComponent
        for _ in 0..<4 {
            let manifest = folder.appendingPathComponent(Manifest.fileName)
            if FileBytes.kind(of: manifest) == .file {
                return try copy(package, as: path, manifest)
            }
            path = "\(folder.lastPathComponent)/\(path)"
            folder = folder.deletingLastPathComponent()
        }
        throw failure(3, "no \(Manifest.fileName) above the package")
    }

    private static func copy(_ package: URL, as path: String, _ manifest: URL) throws -> URL {
        let files = FileManager.default
        let name = package.deletingPathExtension().lastPathComponent
        let target = files.temporaryDirectory
            .appendingPathComponent("\(name)-\(UUID().uuidString).mlmodelc")
        let inner = target.appendingPathComponent(path)
        try files.createDirectory(
            at: inner.deletingLastPathComponent(), withIntermediateDirectories: true)
        try files.copyItem(at: package, to: inner)
        try files.copyItem(at: manifest, to: target.appendingPathComponent(Manifest.fileName))
        let origin = package.standardizedFileURL.path
        try Data(origin.utf8).write(to: target.appendingPathComponent(CompiledPackage.origin))
        return target
    }
}
