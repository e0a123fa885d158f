import Foundation
import MedPhiKit
import Testing

@testable import MedPhiKitCommand

@Suite("Standard input and output of the command")
struct CommandStreamTests {
    @Test(arguments: [(ENOSPC, 1), (EPIPE, 141)] as [(Int32, Int32)])
    func whatCannotBeWrittenIsAFailure(reason: Int32, code: Int32) async {
        for words in [["--help"], ["generate", CommandFixtures.tiny, "-", "--max-tokens", "3"]] {
            guard words.count == 1 || CommandFixtures.hasTiny else { continue }
            let errors = Lines()
            let found = await MedPhiKitCommand.run(
                arguments: words, input: { CommandFixtures.visit },
                output: { _ in throw OutputFailure(code: reason) }, errors: { errors.add($0) })
            #expect(found == code)
            let problems = errors.all.filter { $0.hasPrefix("error: ") }
            #expect(problems.count == (code == 1 ? 1 : 0))
            if code == 1 {
                #expect(
                    problems.first?.contains("standard output cannot be written (No space") == true)
            }
        }
    }

    @Test func theSystemsFailureToWriteIsThrown() throws {
        #expect(throws: OutputFailure.self) { try Streams.write("note", to: -1) }
    }

    @Test(.timeLimit(.minutes(5))) func aSilentPipeCanBeStopped() async throws {
        let pipe = Pipe()
        let descriptor = pipe.fileHandleForReading.fileDescriptor
        let task = Task { try Streams.read(descriptor, limit: 10) }
        try await Task.sleep(for: .milliseconds(20))
        task.cancel()
        await #expect(throws: CancellationError.self) { try await task.value }
        try pipe.fileHandleForWriting.close()
    }

    @Test func workThatDoesNotLookCanBeStopped() async throws {
        let gate = DispatchSemaphore(value: 0)
        let ended = Lines()
        let task = Task {
            try await Reading.stoppable {
                _ = gate.wait(timeout: .now() + 60)
                ended.add("ended")
                return 1
            }
        }
        task.cancel()
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(ended.all.isEmpty)
        gate.signal()
        #expect(try await Reading.stoppable { 2 } == 2)
    }

    @Test(arguments: [(10, true), (11, false)])
    func standardInputHasALimit(bytes: Int, isTaken: Bool) throws {
        let pipe = Pipe()
        try pipe.fileHandleForWriting.write(contentsOf: Data(repeating: 0x41, count: bytes))
        try pipe.fileHandleForWriting.close()
        let descriptor = pipe.fileHandleForReading.fileDescriptor
        let data = try? Streams.read(descriptor, limit: 10)
        #expect((data?.count == bytes) == isTaken)
        try pipe.fileHandleForReading.close()
    }

    @Test func aTextOverTheLimitNamesTheLimit() async throws {
        let folder = try CommandFixtures.folder()
        defer { try? FileManager.default.removeItem(at: folder) }
        let file = folder.appendingPathComponent("long").path
        #expect(FileManager.default.createFile(atPath: file, contents: nil))
        #expect(truncate(file, off_t(Reading.limit + 1)) == 0)
        let run = await CommandRun.of("generate", CommandFixtures.tiny, file)
        #expect(run.code == 1 && run.problem.contains("at most \(Reading.limit) bytes"))
    }
}

@Suite("What the command gives a terminal")
struct CommandTerminalTests {
    static let dangerous = "a\u{1B}[31m\u{7}\n\r\t\u{9B}2J\u{202E}\u{2028}é中"

    @Test func nothingIsObeyed() {
        #expect(
            Terminal.line(Self.dangerous)
                == "a\\u{1b}[31m\\u{07}\\u{0a}\\u{0d}\\u{09}\\u{9b}2J\\u{202e}\\u{2028}é中")
        #expect(
            Terminal.text("a\u{1B}\n\tb\r\n") == "a\\u{1b}\n\tb\\u{0d}\n")
        #expect(Terminal.note("a\u{1B}\n\tb\r\n\u{9B}c") == "a\n\tb\nc")
        #expect(Terminal.line("") == "" && Terminal.note("") == "")
    }

    @Test func jsonKeepsItsValue() throws {
        let value: JSONValue = ["a": .string(Self.dangerous)]
        let output = Lines()
        Console(input: { Data() }, output: { output.add($0) }, errors: { _ in }).print(value)
        let text = output.all.joined()
        #expect(try JSONValue(parsing: text)["a"]?.string == Self.dangerous)
        #expect(!text.unicodeScalars.contains { (0x7F..<0xA0).contains($0.value) })
    }

    @Test func everyWayOutIsCovered() throws {
        let output = Lines()
        let console = Console(
            input: { Data() }, output: { output.add($0) }, errors: { output.add($0) })
        console.print(Console.table([("name", Self.dangerous)]))
        console.print(Self.dangerous)
        console.note(Self.dangerous)
        console.fail(Self.dangerous)
        try console.write(Self.dangerous)
        let controls = output.all.joined().unicodeScalars.filter {
            $0.properties.generalCategory == .control && $0 != "\n" && $0 != "\t"
        }
        #expect(controls.isEmpty)
        for line in [output.all[0], output.all[2], output.all[3]] {
            #expect(line.dropLast().allSatisfy { !$0.isNewline } && line.hasSuffix("\n"))
        }
    }

    @Test(arguments: [
        (Double.nan, "not a number"), (.infinity, "infinite"), (1.25, "1.2 s"), (0, "0.0 s"),
    ])
    func aNumberThatIsNoneIsSaidInWords(value: Double, shown: String) {
        #expect(Console.number(value, decimals: 1, unit: " s") == shown)
    }
}
