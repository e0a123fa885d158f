import Foundation
import Testing

@testable import Phi3Core

@Suite struct AdapterFuzzTests {
    /// Reads a spoiled adapter; whatever happens must be an error of this package, or a whole adapter.
    private func attempt(_ url: URL, _ target: AdapterTarget, _ base: Checkpoint) {
        var target = target
        target.slotRank = 8
        do {
            let options = AdapterOptions(allowsUnstatedBase: true, allowsOtherBase: true)
            let adapter = try Adapter.load(url, for: target, base: base, options: options)
            _ = try AdapterSlots(adapter, for: target)
        } catch {
            #expect(isReadable(error), "\(error)")
        }
    }

    @Test(arguments: [Small.file, Small.pack])
    func spoiledFilesNeverCrash(source: URL) throws {
        let folder = try TestFolder()
        let place = folder["x.safetensors"]
        let target = try Small.target()
        let base = try Checkpoint.open(Small.base)
        let whole = try Data(contentsOf: source)
        let header = Int(whole.withUnsafeBytes { $0.loadUnaligned(as: UInt64.self) })
        let value = try JSONValue(parsing: whole[8..<8 + header])
        let tail = whole.dropFirst(8 + header)
        var generator = SplitMix(13)
        for round in 0..<FileFixtures.fuzzCount(400) {
            if round % 3 == 0 {
                try Spoiler.bytes(whole, &generator).write(to: place)
            } else {
                let text = Data(Self.spoiled(value, &generator).text(.compact).utf8)
                var length = UInt64(text.count).littleEndian
                try (withUnsafeBytes(of: &length) { Data($0) } + text + tail).write(to: place)
            }
            attempt(place, target, base)
        }
    }

    /// Headers with strange facts or strange entries.
    private static func spoiled(_ value: JSONValue, _ generator: inout SplitMix) -> JSONValue {
        guard var members = value.object, var facts = members["__metadata__"]?.object,
            let name = facts.names.randomElement(using: &generator), Bool.random(using: &generator)
        else { return Spoiler.value(value, &generator) }
        let old = facts[name]?.string ?? ""
        let parsed = (try? JSONValue(parsing: old)) ?? .string(old)
        facts[name] = .string(Spoiler.value(parsed, &generator).text())
        members["__metadata__"] = .object(facts)
        return .object(members)
    }

    @Test(arguments: ["peft_0", "peft_2"])
    func spoiledSettingsNeverCrash(name: String) throws {
        let source = FileFixtures.mini.appendingPathComponent(name)
        let folder = try TestFolder()
        try FileManager.default.copyItem(
            at: source.appendingPathComponent(Adapter.peftName), to: folder[Adapter.peftName])
        var config = try #require(
            FileBytes.json(source.appendingPathComponent(Adapter.configName)).object)
        config["rank_pattern"] = ["layers.0.self_attn.qkv_proj": 8.json]
        config["alpha_pattern"] = [#"layers\.\d+.mlp.*"#: 3.json]
        let target = try Small.target()
        let base = try Checkpoint.open(Small.base)
        var generator = SplitMix(17)
        for _ in 0..<FileFixtures.fuzzCount(150) {
            let spoiled = Spoiler.value(.object(config), &generator)
            try folder.write(spoiled.text(), Adapter.configName)
            attempt(folder.url, target, base)
        }
    }
}
