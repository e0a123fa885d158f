import Foundation

/// What a tokenizer needs besides tokenizer.json: the tokens of its chats, and what ends a text.
public struct TokenizerConfiguration: Sendable, Equatable {
    /// `bos_token` of tokenizer_config.json; Phi-3's chats do not use it.
    public var bosToken: String
    /// `eos_token` of tokenizer_config.json, which closes a chat.
    public var eosToken: String
    /// `pad_token` of tokenizer_config.json, where it has one.
    public var padToken: String?
    /// The structure of its chats.
    public var chatTemplate: ChatTemplate
    /// The `eos_token_id` list of generation_config.json, or a manifest's stop ids.
    public var stopIDs: [Int32]

    /// Makes a configuration, without any file Phi-3-mini's.
    public init(
        bosToken: String = "<s>", eosToken: String = ChatTemplate.endOfText,
        padToken: String? = nil, chatTemplate: ChatTemplate = ChatTemplate(), stopIDs: [Int32] = []
    ) {
        self.bosToken = bosToken
        self.eosToken = eosToken
        self.padToken = padToken
        self.chatTemplate = chatTemplate
        self.stopIDs = stopIDs
    }

    /// Reads the configuration files of a checkpoint.
    ///
    /// - Parameters:
    ///   - config: tokenizer_config.json.
    ///   - template: chat_template.jinja, which goes before the template of `config`.
    ///   - generation: generation_config.json.
    ///   - place: how messages name the folder.
    /// - Throws: `Phi3Error.tokenizer` or `.chatTemplate` for what cannot be read or reproduced.
    public init(
        config: Data, template: Data? = nil, generation: Data? = nil, place: String = "tokenizer"
    ) throws {
        let configPlace = "\(place)/tokenizer_config.json"
        let value = try Self.object(config, configPlace)
        eosToken = Self.token(value["eos_token"]) ?? ChatTemplate.endOfText
        bosToken = Self.token(value["bos_token"]) ?? eosToken
        padToken = Self.token(value["pad_token"])
        let source: String
        if let template {
            guard let text = String(validating: template, as: UTF8.self) else {
                throw Self.problem("\(place)/chat_template.jinja", "damaged (not UTF-8)")
            }
            source = text
        } else {
            guard let text = Self.template(value["chat_template"]) else {
                throw Self.problem(configPlace, "no chat_template, and no chat_template.jinja")
            }
            source = text
        }
        chatTemplate = try ChatTemplate(parsing: source, bosToken: bosToken, eosToken: eosToken)
        stopIDs =
            try generation.map {
                try Self.stops($0, "\(place)/generation_config.json")
            } ?? []
    }

    private static func object(_ data: Data, _ place: String) throws -> JSONValue {
        do {
            let value = try JSONValue(parsing: data)
            if value.object != nil { return value }
            throw problem(place, "damaged (not a JSON object)")
        } catch let error as JSONSyntaxError {
            throw problem(place, "damaged (\(error.description))")
        }
    }

    private static func token(_ value: JSONValue?) -> String? {
        let text = value?["content"]?.string ?? value?.string
        return text.flatMap { $0.isEmpty ? nil : $0 }
    }

    private static func template(_ value: JSONValue?) -> String? {
        guard let named = value?.array else { return value?.string }
        return named.last { $0["name"]?.string == "default" }?["template"]?.string
    }

    private static func stops(_ data: Data, _ place: String) throws -> [Int32] {
        guard let value = try object(data, place)["eos_token_id"], !value.isNull else { return [] }
        return try (value.array ?? [value]).map { item in
            guard let id = item.integer.flatMap({ Int32(exactly: $0) }) else {
                throw problem(place, "an eos_token_id that is no id")
            }
            return id
        }
    }

    private static func problem(_ place: String, _ found: String) -> Phi3Error {
        .tokenizer(
            ErrorDetails(
                place: place, found: found,
                expected: "the tokenizer files of an instruction-tuned Phi-3",
                advice: "Copy them again from the base model."))
    }
}
