import Foundation
import MedPhiKit
import Testing

@testable import MedPhiKitCommand

@Suite("What the command prints", .enabled(if: CommandFixtures.hasTiny, "no checkout around"))
struct CommandTests {
    private let tiny = CommandFixtures.tiny

    @Test func everyVerbHasHelpWithExamples() async {
        let all = await CommandRun.of("--help")
        #expect(all.code == 0 && all.errors.isEmpty)
        for verb in MedPhiKitCommand.verbs {
            #expect(all.output.contains("  \(verb.name) "))
            let help = await CommandRun.of(verb.name, "--help")
            #expect(help.code == 0 && help.errors.isEmpty)
            #expect(help.output.hasPrefix("medphi-kit \(verb.name)"))
            for option in verb.options { #expect(help.output.contains(option.shown)) }
            #expect(await CommandRun.of("help", verb.name).output == help.output)
            #expect(!verb.examples.isEmpty)
            for example in verb.examples { #expect(help.output.contains(example)) }
        }
        #expect(await CommandRun.of("--version").output == "medphi-kit 0.1.0\n")
    }

    /// The words of every example are verbs and options that exist.
    @Test func examplesAreTypedRight() throws {
        for verb in MedPhiKitCommand.verbs {
            for example in verb.examples {
                let words = example.replacing("'381 284 383'", with: "1")
                    .replacing("'Doctor: any fever?'", with: "x").split(separator: " ")
                    .map(String.init)
                let typed = words.prefix { !["<", ">", "#"].contains($0) }
                #expect(typed.prefix(2) == ["medphi-kit", verb.name])
                _ = try Arguments(Array(typed.dropFirst(2)), verb)
            }
        }
    }

    @Test func inspectSaysWhatACheckpointIs() async throws {
        let text = await CommandRun.of("inspect", tiny)
        #expect(text.code == 0 && text.errors.isEmpty)
        #expect(text.output.contains("fingerprint") && text.output.contains("as computed"))
        let json = try JSONValue(parsing: await CommandRun.of("inspect", tiny, "--json").output)
        #expect(json["kind"]?.string == "checkpoint")
        let fingerprint = json["base_fingerprint"]?.string ?? ""
        #expect(fingerprint == "b1913c2ac90d47397ccfd08ee56ddf6b0e5a1747090f4466e4cf2254704d7421")
        #expect(json["memory"]?["verdict"]?.string == "fits")
        let longer = try JSONValue(
            parsing: await CommandRun.of("inspect", tiny, "--json", "--context", "64").output)
        #expect(longer["memory"]?["context"]?.integer == 64)
    }

    @Test func tokenizeGoesThereAndBack() async throws {
        let text = "Doctor: any <|end|> fever? 38.5 °C"
        let ids = await CommandRun.of("tokenize", tiny, text)
        #expect(ids.code == 0 && ids.errors.isEmpty)
        let back = await CommandRun.of("tokenize", tiny, "--ids", ids.output)
        #expect(back.output == text + "\n")
        let piped = await CommandRun.of("tokenize", tiny, "-", input: Data(text.utf8))
        #expect(piped.output == ids.output)
        #expect(await CommandRun.of("tokenize", tiny, input: Data(text.utf8)).output == ids.output)
        let json = try JSONValue(
            parsing: await CommandRun.of("tokenize", "--json", tiny, "--", text).output)
        let listed = json["ids"]?.array?.compactMap(\.integer) ?? []
        #expect(listed.map(String.init).joined(separator: " ") + "\n" == ids.output)
        #expect(json["count"]?.integer == listed.count)
        #expect(json["tokens"]?.array?.count == listed.count)
    }

    @Test func aChatIsEncodedAsTheModelReadsIt() async throws {
        let tokenizer = try Tokenizer.load(directory: URL(fileURLWithPath: tiny))
        let wanted = try tokenizer.encodeChat([ChatMessage(role: .user, content: "Any fever?")])
        let expected = wanted.map(String.init).joined(separator: " ") + "\n"
        #expect(await CommandRun.of("tokenize", tiny, "--chat", "Any fever?").output == expected)
        let list = #"[{"role": "user", "content": "Any fever?"}]"#
        #expect(await CommandRun.of("tokenize", tiny, "--chat", list).output == expected)
    }

    @Test func generateWritesTheSameNoteInEveryForm() async throws {
        let words = ["generate", tiny, "-", "--max-tokens", "6", "--backend", "reference"]
        let plain = await CommandRun.of(words, input: CommandFixtures.visit)
        #expect(plain.code == 0)
        #expect(plain.output.hasSuffix("\n") || plain.output.isEmpty)
        #expect(!plain.errors.contains("\r") && !plain.errors.contains("\u{1B}"))
        let json = try JSONValue(
            parsing: await CommandRun.of(words + ["--json", "--ids"], input: CommandFixtures.visit)
                .output)
        let note = json["note"]?.string ?? "-"
        #expect(plain.output == (note.isEmpty ? "" : note + "\n"))
        #expect(
            json["finish_reason"]?.string == "length" || json["finish_reason"]?.string == "stop")
        let ids = await CommandRun.of(words + ["--ids"], input: CommandFixtures.visit)
        let listed = json["ids"]?.array?.compactMap(\.integer).map(String.init) ?? []
        #expect(ids.output == listed.joined(separator: " ") + "\n")
        #expect(json["note_tokens"]?.integer == listed.count && !listed.isEmpty)
        #expect(plain.errors.contains("A clinician must read and correct it"))

        // The ids are those of the library.
        let model = try await Phi3.load(URL(fileURLWithPath: tiny), backend: .reference)
        let result = try await model.generateNote(
            from: Conversation(utf8: CommandFixtures.visit),
            options: NoteOptions(generation: GenerationOptions(maxTokens: 6))
        ).result
        #expect(result.completion.ids.map { String($0) } == listed)
    }

    @Test func aSeedDecidesTheText() async {
        func ids(_ seed: String) async -> String {
            await CommandRun.of(
                [
                    "generate", tiny, "-", "--max-tokens=4", "--temperature=2", "--top-p", "0.9",
                    "--top-k", "50", "--min-p", "0.01", "--repetition-penalty", "1.1", "--seed",
                    seed, "--ids", "--section", "GENHX",
                ], input: CommandFixtures.visit
            ).output
        }
        let seven = await ids("7")
        #expect(await ids("7") == seven)
        #expect(await ids("8") != seven)
    }

    @Test func whatIsStoppedKeepsWhatWasWritten() async throws {
        let (stream, wrote) = AsyncStream<Void>.makeStream()
        let tiny = tiny
        let task = Task {
            let run = await CommandRun.of(
                ["generate", tiny, "-", "--max-tokens", "900", "--temperature", "3"],
                input: CommandFixtures.visit
            ) { text in
                if !text.isEmpty { wrote.yield() }
            }
            wrote.finish()
            return run
        }
        for await _ in stream { break }
        task.cancel()
        let run = await task.value
        #expect(run.code == 130)
        #expect(!run.output.isEmpty && run.output.hasSuffix("\n"))
        #expect(run.errors.contains("cancelled"))
    }

    @Test func benchMeasures() async throws {
        let words = ["bench", tiny, "--prompt", "4", "--tokens", "2", "--repeat", "2"]
        let run = await CommandRun.of(words + ["--json"])
        #expect(run.code == 0)
        let json = try JSONValue(parsing: run.output)
        #expect(json["runs"]?.integer == 2 && json["prompt_tokens"]?.integer == 4)
        #expect((json["prefill_tokens_per_second"]?["median"]?.double ?? 0) > 0)
        #expect((json["load_seconds"]?.double ?? 0) > 0)
        #expect((json["encode_seconds"]?.double ?? 0) > 0)
        #expect(await CommandRun.of(words).output.contains("tokens/s"))
    }

    @Test(arguments: [
        (0, 29, 0), (2, 29, 0), (14, 29, 40), (28, 29, 90), (29, 29, 100), (30, 29, 100),
        (0, 0, 100), (3, 10, 30), (7, 10, 70), (Int.max / 2, Int.max, 50), (Int.max, Int.max, 100),
    ])
    func progressEndsAtAHundred(done: Int, total: Int, percent: Int) {
        #expect(Install.percent(done, of: total) == percent)
    }

    @Test func completionsKnowEveryVerbAndOption() async {
        for shell in ["bash", "zsh"] {
            let script = await CommandRun.of("completions", shell).output
            for verb in MedPhiKitCommand.verbs {
                #expect(script.contains("\(verb.name))"))
                for option in verb.options { #expect(script.contains("--\(option.name)")) }
            }
        }
    }
}
