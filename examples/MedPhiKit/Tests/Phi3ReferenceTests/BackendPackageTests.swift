import Foundation
import Phi3Core
import Testing

@testable import Phi3Reference

/// Weights that are read out of a bundle's package.
@Suite struct BackendPackageTests {
    /// Four bits in groups, eight in embedding and head, and two adapters in slots.
    static let mini = Fixtures.root.appendingPathComponent("tests/fixtures/swift/mini.medphi")

    @Test(arguments: [nil, "a", "b"])
    func aBundleGivesTheLogitsOfItsCertificate(adapter: String?) throws {
        let bundle = try ModelBundle.open(Self.mini)
        try Golden.check(bundle, adapter, limit: 1e-3)
    }

    @Test func rowsThatAreDecodedWhenUsedAreTheSame() throws {
        let bundle = try ModelBundle.open(Self.mini)
        let once = try ReferenceModel(bundle)
        let packed = try ReferenceModel(bundle, options: .init(expandedBytes: 0))
        let ids: [Int32] = [315, 259, 71, 274, 262]
        #expect(try once.logits(ids) == packed.logits(ids))
    }

    @Test(.enabled(if: Golden.hasDemo, "no demo bundle: set MEDPHI_DEMO_BUNDLE"))
    func halfPrecisionBundlesHoldTheirCheckpointsNumbers() throws {
        let bundle = try #require(try Golden.demo())
        let model = try ReferenceModel(bundle)
        let base = try ReferenceModel.load(Fixtures.tiny)
        #expect(model.fingerprint == base.fingerprint)
        #expect(model.embedding.floats() == base.embedding.floats())
        #expect(model.lastNorm == base.lastNorm)
        for (one, other) in zip(model.blocks, base.blocks) {
            #expect(one.inputNorm == other.inputNorm && one.innerNorm == other.innerNorm)
            for projection in Projection.allCases {
                #expect(one[projection].linear.floats() == other[projection].linear.floats())
            }
        }
        try Golden.check(bundle, nil, limit: 1e-4, prompts: ["note"])
    }

    /// Bundles of every kind, where a folder of them is named.
    @Test(.enabled(if: Golden.folder != nil, "no folder of bundles: set MEDPHI_BUNDLES"))
    func bundlesOfEveryKindGiveTheLogitsOfTheirCertificates() throws {
        let folder = try #require(Golden.folder)
        let place = URL(fileURLWithPath: folder)
        for name in try FileManager.default.contentsOfDirectory(atPath: folder).sorted()
        where name.hasSuffix(".medphi") {
            let bundle = try ModelBundle.open(place.appendingPathComponent(name))
            let adapters = bundle.manifest.medphi.adapters
            for adapter in [nil] + adapters.list.map({ Optional($0.name) })
            where adapter == nil || adapters.mode != .fused {
                try Golden.check(bundle, adapter, limit: 2e-3)
            }
        }
    }
}

/// Packages that are not what they should be.
@Suite struct BackendDamageTests {
    /// A copy of the small bundle in which one file is changed; hashes are not looked at.
    private func changed(
        _ path: String, _ change: (inout Data) -> Void
    ) throws -> (ModelBundle, TemporaryFolder) {
        let room = try Fixtures.temporary()
        try FileManager.default.copyItem(at: BackendPackageTests.mini, to: room["b.medphi"])
        let place = room["b.medphi"].appendingPathComponent(path)
        var data = try Data(contentsOf: place)
        change(&data)
        try data.write(to: place)
        return (try ModelBundle.open(room["b.medphi"], check: false), room)
    }

    private static let model = "model/Phi3.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    private static let weights =
        "model/Phi3.mlpackage/Data/com.apple.CoreML/weights/weight.bin"

    @Test func aPackageThatIsCutShortIsRefused() throws {
        for (path, count) in [
            (Self.model, 100), (Self.model, 50_000), (Self.weights, 63), (Self.weights, 70_000),
            (Self.weights, 0), (Self.model, 0),
        ] {
            let (bundle, room) = try changed(path) { $0 = $0.prefix(count) }
            withExtendedLifetime(room) {
                _ = #expect(throws: Phi3Error.self) { _ = try ReferenceModel(bundle) }
            }
        }
    }

    /// Two bytes of a file may not become sixteen times as many in memory.
    @Test func moreFieldsThanAnyProgramHasAreRefused() throws {
        let fields = 1 << 20
        let (bundle, room) = try changed(Self.model) { data in
            data = Data(repeating: 0, count: 2 * (fields + 1))
            for at in stride(from: 0, to: data.count, by: 2) { data[at] = 0x0A }
        }
        let error = withExtendedLifetime(room) {
            #expect(throws: Phi3Error.self) { _ = try ReferenceModel(bundle) }
        }
        #expect(error?.description.contains("\(fields) fields") == true)
        // What nobody asks for is not kept.
        let message = try ProtobufMessage([0x22, 1, 7, 0x0A, 1, 8, 0x20, 9, 0x08, 3])
        #expect(message.all(4).isEmpty && message.number(4) == 0)
        #expect(message.all(1) == [[8]] && message.number(1) == 3)
    }

    @Test func noChangeOfBytesCrashesTheReader() throws {
        let (bundle, room) = try changed(Self.model) { _ in }
        _ = room
        let original = [UInt8](try Data(contentsOf: bundle.place(Self.model)))
        var random = RandomNumbers(seed: 9)
        var refused = 0
        for _ in 0..<60 {
            var bytes = original
            for _ in 0..<4 {
                bytes[Int(random.next() % UInt64(bytes.count))] = UInt8(random.next() & 0xFF)
            }
            do {
                let program = try PackageProgram(bytes[...], function: "decode")
                #expect(program.constants.count < 1000)
            } catch is ProtobufReader.Damaged {
                refused += 1
            }
        }
        #expect(refused > 0)
    }

    @Test func aWeightFileThatLiesIsRefused() throws {
        // The first record: type, bytes and place of the embedding's codes.
        for (offset, value) in [(64, 1), (68, 99), (72, 1), (80, 255), (86, 255)] {
            let (bundle, room) = try changed(Self.weights) { $0[offset] = UInt8(value) }
            withExtendedLifetime(room) {
                _ = #expect(throws: Phi3Error.self) { _ = try ReferenceModel(bundle) }
            }
        }
    }

    @Test func pathsOutOfThePackageAreNotFollowed() throws {
        let manifest = "model/Phi3.mlpackage/Manifest.json"
        for path in ["../../../metadata.json", "/etc/passwd", "com.apple.CoreML/../../x"] {
            let (bundle, room) = try changed(manifest) { data in
                let text = String(decoding: data, as: UTF8.self)
                    .split(separator: "com.apple.CoreML/model.mlmodel")
                data = Data(text.joined(separator: path).utf8)
            }
            withExtendedLifetime(room) {
                _ = #expect(throws: Phi3Error.self) { _ = try ReferenceModel(bundle) }
            }
        }
    }
}

/// Numbers for tests that are the same every time.
struct RandomNumbers {
    private var state: UInt64

    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return state >> 16
    }
}

/// The logits that MLX gave for a bundle's weights.
enum Golden {
    /// Whether there is a demo bundle.
    static let hasDemo = given("MEDPHI_DEMO_BUNDLE") != nil
    /// A folder of bundles of every kind, where there is one.
    static let folder = given("MEDPHI_BUNDLES")

    /// The demo's bundle, where there is one.
    static func demo() throws -> ModelBundle? {
        try given("MEDPHI_DEMO_BUNDLE").map { try ModelBundle.open(URL(fileURLWithPath: $0)) }
    }

    private static func given(_ name: String) -> String? {
        let path = ProcessInfo.processInfo.environment[name] ?? ""
        return path.isEmpty ? nil : path
    }

    /// Compares a model with every case of an adapter, as a share of the largest logit.
    static func check(
        _ bundle: ModelBundle, _ adapter: String?, limit: Float,
        prompts: Set<String> = ["note", "edge"]
    ) throws {
        var model = try ReferenceModel(bundle)
        let mode = bundle.manifest.medphi.adapters.mode
        if let adapter, mode == .functions {
            model = try model.applying(builtIn: adapter, of: bundle)
        } else if let adapter, let url = bundle.adapters[adapter] {
            model = try model.applyLoRA(url)
        }
        let file = try SafetensorsFile(bundle.place("parity.safetensors"))
        let cases = try FileBytes.json(bundle.parity)["cases"]?.array ?? []
        var count = 0
        for item in cases
        where item["adapter"]?.string == adapter && prompts.contains(item["prompt"]?.string ?? "") {
            let read = ["ids", "continuation"].flatMap { item[$0]?.array ?? [] }
            let ids = read.compactMap { $0.integer }.map(Int32.init)
            let rows = try #require(item["rows"]?.array).compactMap(\.integer)
            let expected = try #require(file.tensor(item["name"]?.string ?? "")).floats()
            let size = model.config.vocabSize
            let logits = try model.logits(ids)
            let found = rows.flatMap { logits[$0 * size..<($0 + 1) * size] }
            let largest = expected.reduce(Float(0)) { max($0, abs($1)) }
            let difference = largestDifference(found, expected) / largest
            #expect(difference < limit, "\(bundle.url.lastPathComponent) \(adapter ?? "base")")
            count += 1
        }
        #expect(count > 0)
    }
}
