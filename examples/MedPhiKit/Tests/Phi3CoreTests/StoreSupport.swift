import Foundation
import Synchronization
import Testing

@testable import Phi3Core

/// Bundles of a few kilobytes, and stores that do not wait long.
enum StoreFixtures {
    static let weights = "model/Phi3.mlpackage/Manifest.json"
    /// Ends what hangs; nothing that a test decides depends on it.
    static let limit = TimeLimitTrait.timeLimit(.minutes(10))
    static let quick = StoreOptions(
        allowsNetwork: true, attempts: 3, firstDelay: .milliseconds(1),
        longestDelay: .milliseconds(5), stall: .seconds(300))

    /// Bytes that follow from a seed.
    static func bytes(_ count: Int, seed: UInt64) -> Data {
        var generator = SplitMix(seed)
        var data = Data(capacity: count + 8)
        while data.count < count {
            withUnsafeBytes(of: generator.next()) { data.append(contentsOf: $0) }
        }
        return data.prefix(count)
    }

    /// Writes a bundle whose largest file follows from `seed`.
    static func bundle(seed: UInt64, weightBytes: Int = 100_000) throws -> TestFolder {
        let folder = try TestFolder()
        var contents = [
            "adapters/soap.safetensors": bytes(3000, seed: 7),
            weights: bytes(weightBytes, seed: seed),
            "tokenizer/chat_template.jinja": Data("template".utf8),
            "tokenizer/tokenizer.json": Data("{}".utf8),
            "tokenizer/vectors.json": Data("[]".utf8),
            // The same bytes at two places are fetched once.
            "generation_config.json": Data("{}".utf8),
        ]
        for (path, data) in contents { try folder.write(data, path) }
        let manifest = try manifest(contents)
        contents["metadata.json"] = manifest
        try folder.write(manifest, "metadata.json")
        let lines = contents.keys.sorted().map { "\(SHA256.hex(contents[$0]!))  \($0)\n" }
        try folder.write(lines.joined(), "SHA256SUMS")
        return folder
    }

    private static func manifest(_ contents: [String: Data]) throws -> Data {
        func hash(_ path: String) -> JSONValue { .string(SHA256.hex(contents[path]!)) }
        var value = ManifestFixture.value()
        func set(_ path: [String], _ new: JSONValue) {
            func change(_ value: JSONValue, _ rest: ArraySlice<String>) -> JSONValue {
                guard let name = rest.first, var members = value.object else { return new }
                members[name] = change(members[name] ?? .null, rest.dropFirst())
                return .object(members)
            }
            value = change(value, path[...])
        }
        set(["medphi", "tokenizer", "sha256"], hash("tokenizer/tokenizer.json"))
        set(["medphi", "tokenizer", "chat_template_sha256"], hash("tokenizer/chat_template.jinja"))
        let entries = value["medphi"]?["adapters"]?["list"]?.array ?? []
        var entry = entries[0].object!
        entry["sha256"] = hash("adapters/soap.safetensors")
        set(["medphi", "adapters", "list"], .array([.object(entry)]))
        let files = contents.keys.sorted().map { path -> JSONValue in
            ["path": .string(path), "bytes": contents[path]!.count.json, "sha256": hash(path)]
        }
        set(["medphi", "files"], .array(files))
        return Data(value.text(.pretty).utf8)
    }

    /// A store in a folder of its own, and the server it asks.
    static func store(
        _ folder: TestFolder, _ options: StoreOptions = quick, disk: StoreDisk = .system
    ) throws -> BundleStore {
        try BundleStore(
            folder: folder.url, options: options, transport: URLSessionTransport(), disk: disk)
    }

    /// What a store still has of an interrupted installation.
    static func partials(_ folder: TestFolder, _ name: String = "notes") -> [String: Int] {
        let place = folder[".store/\(name)/arriving"]
        let names = (try? FileManager.default.contentsOfDirectory(atPath: place.path)) ?? []
        return Dictionary(
            uniqueKeysWithValues: names.filter { $0.hasSuffix(".partial") }.map {
                ($0, FileBytes.size(of: place.appendingPathComponent($0)))
            })
    }
}

/// Events of an installation, in order.
final class StoreEvents: Sendable {
    private let events = Mutex<[InstallEvent]>([])
    func add(_ event: InstallEvent) { events.withLock { $0.append(event) } }
    var all: [InstallEvent] { events.withLock { $0 } }
    var waits: [String] {
        all.compactMap { if case .waiting(_, _, let reason) = $0 { reason } else { nil } }
    }
}
