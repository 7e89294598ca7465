// Tokenize with llama.cpp, through the npm package node-llama-cpp.
//
// node llama_tokens.mjs FOLDER_WITH_NODE_MODULES REQUEST
// reads [{"path": GGUF, "texts": [...]}, ...] from the file REQUEST and writes [{"tokens": [[...], ...], "bos": id | null, "eos": id | null, "ends": [...]}, ...]

import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(process.argv[2] + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", skipDownload: true});
const answers = [];
for (const {path, texts} of JSON.parse(readFileSync(process.argv[3], "utf8"))) {
    const model = await llama.loadModel({modelPath: path, vocabOnly: true, useMmap: false});
    const {tokens} = model;
    const ends = [];
    for (const token of model.iterateAllTokens())
        if (model._model.isEogToken(token)) ends.push(token); // the public one adds eot
    answers.push({
        tokens: texts.map((text) => model.tokenize(text, true)), // recognises special tokens
        bos: tokens.shouldPrependBosToken ? tokens.bos : null,
        eos: tokens.shouldAppendEosToken ? tokens.eos : null,
        ends
    });
    await model.dispose();
}
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
