import Foundation
import MedPhiKit
import Testing

@testable import MedPhiKitCommand
@testable import Phi3Core

@Suite("What the command is given", .enabled(if: CommandFixtures.hasTiny, "no checkout around"))
struct CommandInputTests {
    let tiny = CommandFixtures.tiny

    @Test(arguments: [
        (["generate", "TINY", ""], "CONVERSATION is empty"),
        (["generate", "TINY", "-", "--adapter", ""], "--adapter is empty"),
        (["bench", "TINY", "--adapter="], "--adapter is empty"),
    ])
    func anEmptyWordIsWrongUsage(typed: [String], says: String) async {
        let run = await CommandRun.of(
            typed.map { $0 == "TINY" ? tiny : $0 }, input: CommandFixtures.visit)
        #expect(run.code == 2 && run.problem.contains(says), "\(run.errors)")
    }

    @Test func anAdapterThatIsADeviceIsNamed() async {
        let run = await CommandRun.of(
            ["generate", tiny, "-", "--adapter", "/dev/null"], input: CommandFixtures.visit)
        #expect(run.code == 1 && run.problem.hasPrefix("/dev/null: exists, but is no file"))
    }

    @Test func aWrongTurnIsNamedByFileAndLine() async throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        let file = folder.appendingPathComponent("visit.txt")
        try Data("Doctor: Any fever?\r\n\r\nDoctor 0: Sesame\n".utf8).write(to: file)
        let run = await CommandRun.of("generate", tiny, file.path)
        #expect(run.code == 1 && run.problem.hasPrefix("\(file.path), line 3: its speaker"))
        let piped = await CommandRun.of(["generate", tiny, "-"], input: Data("Doctor 0: x".utf8))
        #expect(piped.problem.hasPrefix("standard input, line 1: "), "\(piped.errors)")
    }

    @Test func aWordAmongIdsIsNotRepeated() async {
        let run = await CommandRun.of("tokenize", tiny, "--ids", "1 2 secretword")
        #expect(run.code == 2 && run.problem.contains("word 3 of 3 is no id"))
        #expect(!run.errors.contains("secret"))
    }

    @Test func aFileThatIsNoModelHasNoTokenizer() async {
        for path in ["\(tiny)/config.json", "/dev/null"] {
            let run = await CommandRun.of("tokenize", path, "x")
            #expect(run.code == 1 && run.problem.contains("is not a .safetensors file"))
        }
        let single = await CommandRun.of("tokenize", "\(tiny)/model.safetensors", "x")
        #expect(single.code == 0)
    }

    @Test func aLongConversationIsAnnounced() async {
        let line = "Doctor: Any fever?\nPatient: Since Monday, 38.5.\n"
        let long = Data(String(repeating: line, count: 21_000).utf8)
        let run = await CommandRun.of(
            ["generate", tiny, "-", "--section="], input: long)
        #expect(
            run.errors.hasPrefix("reading the conversation: 1.0 MB\n"), "\(run.errors.count)")
    }

    @Test(arguments: ["model.safetensors", "config.json", "tokenizer.json"])
    func aPointerOfGitLFSIsNamed(name: String) async throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        for file in try FileManager.default.contentsOfDirectory(atPath: tiny) where file != name {
            try FileManager.default.copyItem(
                atPath: "\(tiny)/\(file)", toPath: folder.appendingPathComponent(file).path)
        }
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
        try Data(pointer.utf8).write(to: folder.appendingPathComponent(name))
        var runs = [
            await CommandRun.of(["generate", folder.path, "-"], input: CommandFixtures.visit)
        ]
        runs.append(
            name == "tokenizer.json"
                ? await CommandRun.of("tokenize", folder.path, "x")
                : await CommandRun.of("inspect", folder.path))
        for run in runs {
            #expect(run.code == 1 && run.problem.contains("\(name): a Git LFS pointer"))
            #expect(run.problem.contains("git lfs pull"), "\(run.errors)")
        }
    }
}

@Suite("Reasons of the system")
struct CommandReasonTests {
    @Test func aFolderThatCannotBeMadeHasAReasonInWords() throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        let file = folder.appendingPathComponent("FILE")
        try Data("abc".utf8).write(to: file)
        for url in [file, file.appendingPathComponent("inside")] {
            do {
                try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
                Issue.record("a folder inside a file")
            } catch {
                let reason = FileBytes.reason(of: error)
                #expect(!reason.contains("error") && !reason.contains { $0.isNumber }, "\(reason)")
                let text = Phi3Error.notWritten(path: url.path, reason: reason).description
                #expect(text.contains("is a file). Expected a folder"), "\(text)")
            }
        }
        do {
            _ = try Data(contentsOf: folder.appendingPathComponent("NONE"))
        } catch {
            #expect(FileBytes.reason(of: error).lowercased() == "no such file or directory")
        }
    }

    @Test(arguments: [4, 256, 512, 516, 640])
    func aCocoaErrorIsWords(code: Int) {
        let reason = FileBytes.reason(of: NSError(domain: NSCocoaErrorDomain, code: code))
        #expect(!reason.contains { $0.isNumber })
    }
}
