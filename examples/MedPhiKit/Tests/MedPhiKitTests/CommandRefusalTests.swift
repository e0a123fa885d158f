import Foundation
import MedPhiKit
import Testing

@testable import MedPhiKitCommand

@Suite("What the command refuses", .enabled(if: CommandFixtures.hasTiny, "no checkout around"))
struct CommandRefusalTests {
    /// What is typed, the exit code, and a part of the one line that says why. TINY is the demo's
    /// base, EMPTY an empty folder, FILE a file of three bytes.
    static let wrong: [(typed: String, code: Int32, says: String)] = [
        ("", 2, "no verb; expected one of inspect, verify"),
        ("generat TINY -", 2, "did you mean generate?"),
        ("xyzzy", 2, "no verb 'xyzzy'; expected one of"),
        ("--versoin", 2, "did you mean --version?"),
        ("inspect", 2, "MODEL is missing"),
        ("inspect TINY FILE", 2, "is one word too many"),
        ("inspect TINY --jsn", 2, "did you mean --json?"),
        ("inspect TINY --json --json", 2, "--json is there twice"),
        ("inspect TINY --json=yes", 2, "--json takes no value"),
        ("inspect TINY --context", 2, "--context N: its value is missing"),
        ("inspect TINY --context 0", 2, "--context is '0', expected a whole number"),
        ("inspect TINY --context many", 2, "--context is 'many'"),
        ("inspect NONE", 1, "NONE"),
        ("inspect EMPTY", 1, "config.json"),
        ("inspect FILE", 1, "is not a .safetensors file"),
        ("inspect EMPTY.medphi", 1, "no metadata.json"),
        ("verify TINY", 1, "no metadata.json"),
        ("verify NONE", 1, "nothing there"),
        ("verify TINY --level all", 2, "expected files or compute"),
        ("verify TINY --backend gpu", 2, "expected reference or coreml"),
        ("tokenize NONE x", 1, "nothing there"),
        ("tokenize EMPTY x", 1, "tokenizer_config.json"),
        ("tokenize TINY --ids 1,x", 2, "word 2 of 2 is no id"),
        ("tokenize TINY --ids 99999999", 2, "is no id; expected 0 to"),
        ("tokenize TINY --ids --chat x", 2, "do not go together"),
        ("tokenize TINY --chat [1]", 1, "no list of messages"),
        ("tokenize TINY --chat [{\"role\":\"user\"}]", 1, "no list of messages"),
        ("generate TINY NONE", 1, "no such file"),
        ("generate TINY EMPTY", 1, "a folder, expected a file"),
        ("generate NONE FILE", 1, "NONE"),
        ("generate TINY FILE --max-tokens 0", 2, "--max-tokens is '0'"),
        ("generate TINY FILE --max-tokens 1e3", 2, "--max-tokens is '1e3'"),
        ("generate TINY FILE --max-tokens 4000", 2, "--max-tokens is 4000, expected less than"),
        ("generate TINY FILE --temperature hot", 2, "--temperature is 'hot'"),
        ("generate TINY FILE --temperature nan", 2, "--temperature is 'nan'"),
        ("generate TINY FILE --temperature -1", 2, "--temperature is -1.0"),
        ("generate TINY FILE --top-p 2", 2, "--top-p is 2.0"),
        ("generate TINY FILE --top-k -1", 2, "--top-k is '-1'"),
        ("generate TINY FILE --seed -1", 2, "--seed is '-1'"),
        ("generate TINY FILE --section=", 2, "--section: empty"),
        ("generate TINY FILE --adapter none", 1, "no adapter of this name"),
        ("generate TINY FILE --adapter FILE", 1, "FILE"),
        ("generate TINY BLANK", 1, "no words in it"),
        ("generate TINY BYTES", 1, "bytes that are not UTF-8"),
        ("generate TINY FILE --backend coreml", 1, "Core ML"),
        ("generate FILE FILE", 1, "is not a .safetensors file"),
        ("generate CUT FILE", 1, "cut.safetensors"),
        ("generate TINY LONG --no-shorten", 1, "Expected"),
        ("bench TINY --repeat 0", 2, "--repeat is '0'"),
        ("bench TINY --tokens 1000000", 2, "--tokens is 1000000"),
        ("install notes EMPTY", 2, "URL is 'notes'"),
        ("install http://example.com/b EMPTY", 1, "an address without https"),
        ("install http://127.0.0.1:9/b EMPTY --version abc", 2, "--version is 'abc'"),
        ("install http://127.0.0.1:9/b FILE", 1, "FILE"),
        ("install http://127.0.0.1:9/b EMPTY --rollback", 1, "no version before this one"),
        ("completions fish", 2, "expected bash or zsh"),
    ]

    @Test(arguments: wrong)
    func everyMistakeIsOneLine(_ typed: String, _ code: Int32, _ says: String) async throws {
        let folder = try Self.files()
        defer { try? FileManager.default.removeItem(at: folder) }
        let places = [
            "TINY": CommandFixtures.tiny,
            "EMPTY.medphi": folder.appendingPathComponent("e.medphi").path,
            "EMPTY": folder.appendingPathComponent("empty").path,
            "FILE": folder.appendingPathComponent("FILE").path,
            "NONE": folder.appendingPathComponent("NONE").path,
            "BLANK": folder.appendingPathComponent("blank").path,
            "BYTES": folder.appendingPathComponent("bytes").path,
            "LONG": folder.appendingPathComponent("long").path,
            "CUT": folder.appendingPathComponent("cut.safetensors").path,
        ]
        let words = typed.split(separator: " ").map { places[String($0)] ?? String($0) }
        let run = await CommandRun.of(words)
        #expect(run.code == code, "\(run.errors)")
        #expect(run.problem.contains(says), "\(run.errors)")
        #expect(run.output.isEmpty)
        #expect(!run.errors.contains("Sources/"))
    }

    private static func files() throws -> URL {
        let folder = try CommandFixtures.folder()
        for name in ["empty", "e.medphi"] {
            try FileManager.default.createDirectory(
                at: folder.appendingPathComponent(name), withIntermediateDirectories: true)
        }
        let long = String(repeating: "Doctor: Any fever?\nPatient: Since Monday.\n", count: 4000)
        let contents = [
            "FILE": Data("abc".utf8), "blank": Data(" \n\n".utf8), "bytes": Data([0x41, 0xFF]),
            "long": Data(long.utf8), "cut.safetensors": Data([9, 0, 0, 0, 0, 0, 0, 0, 0x7B]),
        ]
        for (name, data) in contents { try data.write(to: folder.appendingPathComponent(name)) }
        return folder
    }

    @Test func wordsOfAConversationAreInNoMessage() async {
        let run = await CommandRun.of(
            "generate", CommandFixtures.tiny, "-", input: Data("Doctor 0: Sesame\n".utf8))
        #expect(run.code == 1 && !run.problem.isEmpty && !run.errors.contains("Sesame"))
    }

    @Test func aMissingPipeIsNamed() async {
        struct Closed: Error {}
        let code = await MedPhiKitCommand.run(
            arguments: ["tokenize", CommandFixtures.tiny, "-"], input: { throw Closed() },
            output: { _ in },
            errors: { #expect($0.contains("standard input cannot be read")) })
        #expect(code == 1)
    }
}
