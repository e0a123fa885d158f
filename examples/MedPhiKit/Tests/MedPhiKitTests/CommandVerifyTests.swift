import Foundation
import MedPhiKit
import Testing

@testable import MedPhiKitCommand

private let mini = CommandFixtures.root.appendingPathComponent("tests/fixtures/swift/mini.medphi")

@Suite(
    "The command on bundles",
    .enabled(
        if: FileManager.default.fileExists(atPath: mini.path), "the recorded bundle is not there"))
struct CommandVerifyTests {
    @Test func aWholeBundlePasses() async throws {
        let run = await CommandRun.of("verify", mini.path, "--backend", "reference", "--json")
        #expect(run.code == 0, "\(run.errors)")
        let json = try JSONValue(parsing: run.output)
        #expect(json["passed"]?.bool == true && json["level"]?.string == "graph")
        #expect(json["bundle"]?.string == "mini.medphi" && json["vectors"]?.integer ?? 0 >= 200)
        #expect(json["graph"]?["cases"]?.array?.count == 3)
        #expect(json["graph"]?["cases"]?.array?.allSatisfy { $0["greedy"]?.bool == true } == true)
        let text = await CommandRun.of("verify", mini.path, "--level", "files")
        #expect(text.code == 0 && text.output.contains("every hash is right"))
        #expect(text.output.contains("nothing was computed"))
    }

    /// A copy of the bundle whose file is changed; hashes are made to fit where `isSigned`.
    private func changed(
        _ folder: URL, _ path: String, isSigned: Bool, _ change: (inout Data) -> Void
    ) throws -> URL {
        let copy = folder.appendingPathComponent("mini.medphi")
        try FileManager.default.copyItem(at: mini, to: copy)
        func edit(_ path: String, _ change: (inout Data) -> Void) throws -> (String, String) {
            let place = copy.appendingPathComponent(path)
            var data = try Data(contentsOf: place)
            let old = SHA256.hex(data)
            change(&data)
            try data.write(to: place)
            return (old, SHA256.hex(data))
        }
        func replace(_ hashes: (String, String)) -> (inout Data) -> Void {
            { data in
                data = Data(
                    String(decoding: data, as: UTF8.self)
                        .replacing(hashes.0, with: hashes.1).utf8)
            }
        }
        let hashes = try edit(path, change)
        guard isSigned else { return copy }
        _ = try edit("SHA256SUMS", replace(hashes))
        _ = try edit("SHA256SUMS", replace(edit("metadata.json", replace(hashes))))
        return copy
    }

    @Test func whatIsBeyondALimitFailsWithAReport() async throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        let copy = try changed(folder, "parity.json", isSigned: true) { data in
            data = Data(
                String(decoding: data, as: UTF8.self)
                    .replacing(#""error": 0.02"#, with: #""error": 1e-9"#).utf8)
        }
        let run = await CommandRun.of("verify", copy.path, "--backend", "reference")
        #expect(run.code == 1 && run.output.contains("NOT passed"))
        #expect(run.problem.contains("a logit is off by") && run.problem.contains("more)"))
        let json = try JSONValue(
            parsing: await CommandRun.of(
                "verify", copy.path, "--json", "--backend", "reference"
            ).output)
        #expect(json["passed"]?.bool == false && json["findings"]?.array?.count ?? 0 >= 3)
    }

    @Test func anAlteredFileIsNamed() async throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        let copy = try changed(folder, "adapters/a.safetensors", isSigned: false) {
            $0 = $0.prefix($0.count / 2)
        }
        let run = await CommandRun.of("verify", copy.path)
        #expect(run.code == 1 && run.problem.contains("adapters/a.safetensors is altered"))
        let json = await CommandRun.of("verify", copy.path, "--json")
        #expect(json.code == 1)
        #expect(try JSONValue(parsing: json.output)["passed"]?.bool == false)
        let visit = folder.appendingPathComponent("visit.txt")
        try CommandFixtures.visit.write(to: visit)
        let note = await CommandRun.of("generate", copy.path, visit.path, "--adapter", "a")
        #expect(note.code == 1 && note.problem.contains("adapters/a.safetensors is altered"))
    }

    /// Every hash is right, and yet `Phi3.load` would refuse it.
    @Test(arguments: [
        (#""user": 315"#, #""user": 311"#, "special_token_ids.user"),
        (#""eps": 1e-05"#, #""eps": 0"#, "eps is 0"),
        (#""prefill_width": 16"#, #""prefill_width": 8"#, "prefill"),
    ])
    func whatCannotBeLoadedDoesNotPass(old: String, new: String, says: String) async throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        let copy = try changed(folder, "metadata.json", isSigned: true) { data in
            let text = String(decoding: data, as: UTF8.self)
            #expect(text.contains(old))
            data = Data(text.replacing(old, with: new).utf8)
        }
        _ = try ModelBundle.open(copy)
        for level in [["--level", "files"], ["--backend", "reference"]] {
            let run = await CommandRun.of(["verify", copy.path] + level)
            #expect(run.code == 1 && run.problem.contains(says), "\(run.errors)")
            #expect(run.output.contains("NOT passed"))
        }
    }

    @Test func inspectSaysWhatABundleIs() async throws {
        let run = await CommandRun.of("inspect", mini.path)
        #expect(run.code == 0 && run.output.contains("slots: a (rank"))
        let json = try JSONValue(
            parsing: await CommandRun.of("inspect", mini.path, "--json").output)
        let manifest = try ModelBundle.open(mini, check: false).manifest
        #expect(json["context_length"]?.integer == manifest.medphi.coreml.contextLength)
        #expect(json["adapters"]?.array?.count == 2 && json["licence"]?.string != nil)
        #expect(json["verification"]?.string == manifest.medphi.verification.level.rawValue)
        let memory = json["memory"]
        #expect(memory?["weights"]?.integer == manifest.medphi.memory.weights)
        #expect(memory?["context"]?.integer == manifest.medphi.coreml.contextLength)
    }

    @Test func anAdapterChangesTheNote() async {
        let notes = CommandFixtures.root.appendingPathComponent(
            "tests/fixtures/swift/notes.safetensors"
        ).path
        func ids(_ more: String...) async -> String {
            await CommandRun.of(
                ["generate", CommandFixtures.tiny, "-", "--ids", "--max-tokens", "4"] + more,
                input: CommandFixtures.visit
            ).output
        }
        let changed = await ids("--adapter", notes)
        #expect(changed.split(separator: " ").count == 4)
        #expect(await ids() != changed)
        let unknown = await CommandRun.of(
            "generate", mini.path, "-", "--adapter", "c", input: CommandFixtures.visit)
        #expect(unknown.code == 1 && unknown.problem.contains("the bundle has: a, b"))
    }

    @Test func aConversationThatCannotFitIsRefused() async {
        let run = await CommandRun.of(
            "generate", mini.path, "-", "--max-tokens", "8", input: CommandFixtures.visit)
        #expect(run.code == 1 && run.problem.contains("a context of 64 less 8 for the note"))
        // Unsaid, a note may take half of a context that is shorter than the usual note.
        let usual = await CommandRun.of("generate", mini.path, "-", input: CommandFixtures.visit)
        #expect(usual.problem.contains("a context of 64 less 32 for the note"))
    }

    @Test(
        "the demo's bundle passes too",
        .enabled(if: CommandFixtures.bundle != nil, "MEDPHI_DEMO_BUNDLE names no bundle"))
    func theDemoPasses() async {
        let bundle = CommandFixtures.bundle ?? ""
        let run = await CommandRun.of("verify", bundle, "--backend", "reference")
        #expect(run.code == 0, "\(run.errors)")
    }
}
