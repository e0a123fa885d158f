import Foundation
import Testing

@testable import Phi3Core

/// What makes two adapters one, and what does not.
@Suite struct AdapterIdentityTests {
    private static let options = AdapterOptions(allowsUnstatedBase: true)

    @Test func tensorsScaleAndKindMakeAnAdapter() throws {
        let whole = try Adapter.read(Small.peft)
        func adapter(_ change: (inout Adapter.Scaling) -> Void) -> String {
            var scaling = whole.scaling
            change(&scaling)
            return Adapter(
                url: URL(fileURLWithPath: "/elsewhere"), changes: whole.changes, scaling: scaling,
                modelLayers: 9, origin: Adapter.Origin(baseName: "other"), form: .file
            ).effectSHA256
        }
        #expect(adapter { $0.dropout = 0.5 } == whole.effectSHA256)
        let others = [
            adapter { $0.scale *= 2 }, adapter { $0.scale = $0.scale.nextUp },
            adapter { $0.isDoRA = true }, whole.effectSHA256, whole.weightsSHA256,
        ]
        #expect(Set(others).count == others.count)
        let fewer = whole.changes.filter { $0.key != whole.sites.last }
        let part = Adapter(
            url: whole.url, changes: fewer, scaling: whole.scaling, modelLayers: 2,
            origin: whole.origin, form: whole.form)
        #expect(part.effectSHA256 != whole.effectSHA256)
    }

    /// Folders of one name with the same tensors, of which each says another strength.
    @Test func anotherScaleUnderTheSameNameIsAnotherAdapter() async throws {
        let folder = try TestFolder()
        let end = try Scripts.tokenizer.get().endID
        let backend = try ScriptedBackend { _, _ in end }
        let base = try Scripts.model(backend)
        let settings: [[String: JSONValue]] = [
            [:], ["lora_alpha": 64.json], ["use_rslora": .bool(false)], [:],
        ]
        for (number, changes) in settings.enumerated() {
            let place = folder["\(number)/notes"]
            try FileManager.default.createDirectory(
                at: folder["\(number)"], withIntermediateDirectories: true)
            try FileManager.default.copyItem(at: Small.peft, to: place)
            let file = place.appendingPathComponent(Adapter.configName)
            var config = try #require(FileBytes.json(file).object)
            for (name, value) in changes { config[name] = value }
            try JSONValue.object(config).text().write(to: file, atomically: true, encoding: .utf8)
            let model = try await base.applyLoRA(.file(place), options: Self.options)
            _ = try await model.respond(to: .ids([5]))
        }
        let ids = backend.record.withLock { $0.calls.compactMap(\.adapter) }
        try #require(ids.count == 4)
        #expect(Set(ids.map(\.name)) == ["notes"])
        #expect(Set(ids).count == 3 && ids.first == ids.last)
    }
}
