import Foundation
import Synchronization
import Testing

@testable import Phi3Core

/// Says what MLX said, or something else on purpose.
private final class GoldenBackend: TokenBackend {
    enum Fault: Equatable {
        case none, off, nan, blind, drift, blocks, first
    }

    let facts: BackendFacts
    private let golden: GoldenLogits
    private let fault: Fault
    private let calls = Mutex((count: 0, length: 0))

    init(_ bundle: ModelBundle, _ fault: Fault) throws {
        golden = try GoldenLogits.read(bundle)
        self.fault = fault
        let coreml = bundle.manifest.medphi
        facts = BackendFacts(
            name: "script", contextLength: coreml.coreml.contextLength,
            vocabularyRows: coreml.model.vocabSize, adapterSupport: .any,
            target: AdapterTarget(bundle.manifest),
            memory: MemoryNeeds(weights: 0, keyValuePerToken: 0))
    }

    func load(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws {}
    func unload() async {}
    func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws {}

    func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float] {
        let (call, before) = calls.withLock { calls in
            defer { calls = (calls.count + 1, ids.count) }
            return calls
        }
        var row = said(ids, fault == .blind ? nil : adapter?.id.name)
        switch fault {
        case .off: row[0] += 0.05 * (row.map(abs).max() ?? 0)
        case .nan: row[3] = .nan
        case .drift: row[0] += Float(call) * 1e-3
        case .blocks where before == 1 && ids.count > 2: row[0] += 100
        case .first: row = row.map { -$0 }
        default: break
        }
        return row
    }

    private func said(_ ids: [Int32], _ adapter: String?) -> [Float] {
        for item in golden.cases where item.adapter == adapter {
            guard item.read.starts(with: ids), let at = item.rows.firstIndex(of: ids.count - 1)
            else { continue }
            return item.row(at).map(Float.init)
        }
        return (0..<facts.vocabularyRows).map { Float(($0 * 7 + ids.count) % 97) / 10 }
    }
}

private let mini = Vectors.recorded.appendingPathComponent("mini.medphi")

@Suite(
    "Comparing a backend with MLX",
    .enabled(
        if: FileManager.default.fileExists(atPath: mini.path), "the recorded bundle is not there"))
struct ParityTests {
    private func report(_ fault: GoldenBackend.Fault) async throws -> ParityReport {
        let bundle = try ModelBundle.open(mini, check: false)
        let backend = try GoldenBackend(bundle, fault)
        let info = ModelInfo(
            name: "mini", source: .bundle(mini), fingerprint: backend.facts.target.fingerprint,
            byteCount: 0)
        let model = try Phi3(
            backend: backend, tokenizer: Tokenizer.load(directory: bundle.tokenizerFolder),
            info: info, bundle: bundle)
        return try await model.checkParity()
    }

    @Test func theSameLogitsPass() async throws {
        let report = try await report(.none)
        #expect(report.passed && report.swaps == true && report.prefillDecode == 0)
        #expect(report.cases.map(\.name) == ["note-base", "note-a", "note-b"])
        for item in report.cases {
            #expect(item.error == 0 && abs(item.kl) < 1e-12 && item.rows == 21)
            #expect(item.sameFirst == 1 && item.decided == 1 && item.greedy == true)
        }
        #expect(report.json["cases"]?.array?.count == 3)
    }

    @Test func whatIsBeyondALimitIsAFinding() async throws {
        func findings(_ fault: GoldenBackend.Fault) async throws -> String {
            let report = try await report(fault)
            #expect(!report.passed)
            return report.findings.joined(separator: "\n")
        }
        #expect(try await findings(.off).contains("note-base: a logit is off by 5.00% of"))
        let broken = try await findings(.nan)
        #expect(broken.contains("a logit is off by") && broken.contains("KL"))
        let blind = try await findings(.blind)
        #expect(blind.contains("note-a: the adapter changes the logits by 0.00%"))
        #expect(blind.contains("note-b: the adapter changes the logits by 0.00%"))
        #expect(try await findings(.drift).contains("put in again gives other logits"))
        #expect(try await findings(.blocks).contains("prefill and decode differ by"))
        let first = try await findings(.first)
        #expect(first.contains("another first token in 100.00% of the decided rows"))
        #expect(try await report(.first).cases[0].greedy == false)
    }

    @Test func aBrokenFigureIsNoNumberInJSON() async throws {
        let json = try await report(.nan).json
        #expect(json["cases"]?.array?.first?["error"] == .null)
        _ = try JSONValue(parsing: json.text())
    }

    @Test func rowsAreComparedByTheirNumbers() {
        let same = RowDifference([1, 3, 2], [1, 3, 2])
        #expect(same.apart == 0 && same.isSame && same.lead == 1 && same.largest == 3)
        // log-probabilities of (0, ln 3) are ln 1/4 and ln 3/4; of (0, 0) ln 1/2 both.
        let apart = RowDifference([0, log(3)], [0, 0])
        let expected = 0.25 * log(0.5) + 0.75 * log(1.5)
        #expect(abs(apart.kl - expected) < 1e-12 && apart.isSame)
        #expect(!RowDifference([0, 1], [1, 0]).isSame)
        #expect(RowDifference([0, 1], [.nan, 0]).apart.isNaN)
    }

    @Test(arguments: [
        (#""schema": 1"#, #""schema": 2"#), (#""rows": ["#, #""rows": [9999, "#),
        (#""ids": ["#, #""ids": [-1, "#), (#""cases": ["#, #""casus": ["#),
        (#""prompt": "note""#, #""prompt": "other""#),
        (#""logits": "parity.safetensors""#, #""logits": "../parity.safetensors""#),
        (#""name": "note-a""#, #""name": "note-x""#),
        (#""continuation": ["#, #""continuation": [99999, "#),
    ])
    func damagedGoldenLogitsAreRefused(_ old: String, _ new: String) async throws {
        let folder = try TestFolder()
        let copy = folder["mini.medphi"]
        try FileManager.default.copyItem(at: mini, to: copy)
        let place = copy.appendingPathComponent("parity.json")
        let text = try String(contentsOf: place, encoding: .utf8)
        #expect(text.contains(old))
        try text.replacing(old, with: new, maxReplacements: 1)
            .write(to: place, atomically: true, encoding: .utf8)
        let bundle = try ModelBundle.open(copy, check: false)
        #expect(throws: Phi3Error.self) { try GoldenLogits.read(bundle) }
    }

    @Test func aBundleWithoutThemSaysHowToGetThem() throws {
        let folder = try TestFolder()
        let copy = folder["mini.medphi"]
        try FileManager.default.copyItem(at: mini, to: copy)
        try FileManager.default.removeItem(at: copy.appendingPathComponent("parity.json"))
        let bundle = try ModelBundle.open(copy, check: false)
        let error = #expect(throws: Phi3Error.self) { try GoldenLogits.read(bundle) }
        #expect(error?.description.contains("--verify graph") == true)
    }
}
