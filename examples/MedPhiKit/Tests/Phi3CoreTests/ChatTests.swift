import Foundation
import Testing

@testable import Phi3Core

@Suite("Chats", .enabled(if: Vectors.hasRecorded, "no checkout around"))
struct ChatTests {
    let tokenizer: Tokenizer

    init() throws { tokenizer = try Tokenizer.load(directory: Vectors.tiny) }

    @Test("words that look like tokens stay words")
    func cannotBeForged() throws {
        var random = SplitMix(7)
        let parts = [
            "<|end|>", "<|user|>", "\n", "<|system|>", " ", "</s>", "<s>", "<unk>", "a",
            "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|", "|>", "\u{85}",
        ]
        for _ in 0..<500 {
            let content = (0..<8).map { _ in parts.randomElement(using: &random) ?? "" }.joined()
            let ids = try tokenizer.encodeChat([ChatMessage(role: .user, content: content)])
            let added = ids.filter { tokenizer.addedIDs.contains($0) }
            #expect(added == [tokenizer.userID, tokenizer.endID, tokenizer.assistantID])
            #expect(tokenizer.encode(content).allSatisfy { !tokenizer.addedIDs.contains($0) })
        }
    }

    @Test("ordinary chats are what the rendered template is")
    func equalsTemplate() throws {
        var random = SplitMix(8)
        for _ in 0..<300 {
            let content = random.text(upTo: 12)
            let messages = [
                ChatMessage(role: .system, content: " \n" + content),
                ChatMessage(role: .user, content: content + " \n"),
            ]
            let text =
                "<|system|>\n \n\(content)<|end|>\n<|user|>\n\(content) \n<|end|>\n<|assistant|>\n"
            #expect(try tokenizer.encodeChat(messages) == tokenizer.encodeUnsafeRaw(text))
        }
    }

    @Test("a prompt is the beginning of the finished chat")
    func promptIsPrefix() throws {
        let question = ChatMessage(role: .user, content: "Doctor: Any pain?")
        let answer = ChatMessage(role: .assistant, content: " None. ")
        let prompt = try tokenizer.encodeChat([question])
        let whole = try tokenizer.encodeChat([question, answer], generation: false)
        #expect(whole.starts(with: prompt))
        #expect(whole.suffix(2) == [tokenizer.endID, tokenizer.eosID])
    }

    @Test("templates are read, or refused for the same reason, as in Python")
    func templates() throws {
        for item in try Vectors.cases("templates") {
            let source = try #require(item["source"]?.string)
            do {
                let made = try ChatTemplate(
                    parsing: source, bosToken: "<s>", eosToken: "<|endoftext|>")
                let expected = try #require(item["structure"], "accepted: \(source)")
                let same = ChatTemplate(
                    opening: try #require(expected["opening"]?.string),
                    closing: try #require(expected["closing"]?.string),
                    afterRole: try #require(expected["after_role"]?.string),
                    afterEnd: try #require(expected["after_end"]?.string),
                    knowsSystem: expected["knows_system"]?.bool == true,
                    skipsEmptySystem: expected["skips_empty_system"]?.bool == true)
                #expect(made == same)
            } catch let error as Phi3Error {
                let reason = try #require(item["refused"]?.string, "refused: \(error) \(source)")
                #expect(error.description.contains("form: \(reason)."))
            }
        }
    }

    @Test(
        "a hostile template takes no time",
        arguments: [" ", "\n", "{{", "{%", "{#", "\\n", "' +", "-}} ", " {%-", "<|user|>'\n"])
    func hostileTemplates(_ part: String) {
        let good =
            "{% for message in messages %}{{'<|user|>' + message['content'] + '<|end|>' + "
            + "'<|assistant|>'}}{% endfor %}"
        let many = String(repeating: part, count: 16_000 / part.utf8.count)
        for template in [good + many, many + good, many] {
            let time = processorSeconds {
                _ = try? ChatTemplate(
                    parsing: String(template.prefix(16_384)), bosToken: "<s>", eosToken: "</s>")
            }
            // Quadratic time is ten seconds and more.
            #expect(time < 4)
        }
    }

    @Test("a system message is refused where the template would drop it")
    func systemIsNotDropped() throws {
        let template = ChatTemplate(opening: "<s>", closing: "", knowsSystem: false)
        let messages = [ChatMessage(role: .system, content: "Write notes.")]
        let error = #expect(throws: Phi3Error.self) {
            try template.pieces(messages, generation: true)
        }
        #expect(error?.description.contains("role 'system'") == true)
        let skips = ChatTemplate(skipsEmptySystem: true)
        let empty = [ChatMessage(role: .system, content: "")]
        #expect(try skips.pieces(empty, generation: false).map(\.text) == ["<|endoftext|>"])
    }

    @Test("a manifest's structure whose tokens do not exist is refused")
    func unknownTokens() throws {
        let file = try Data(contentsOf: Vectors.tiny.appendingPathComponent("tokenizer.json"))
        for wrong in [ChatTemplate(opening: "<bos>"), ChatTemplate(closing: "<eos>")] {
            let configuration = TokenizerConfiguration(chatTemplate: wrong)
            #expect(throws: Phi3Error.self) {
                try Tokenizer(tokenizerJSON: file, configuration: configuration)
            }
        }
        #expect(throws: Phi3Error.self) {
            try Tokenizer(tokenizerJSON: file, configuration: .init(stopIDs: [1152]))
        }
    }
}
