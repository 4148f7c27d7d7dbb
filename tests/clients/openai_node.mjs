// openai-node against the demo model. Usage: node openai_node.mjs http://127.0.0.1:8000
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is 12 + 7?" }];

const whole = await client.chat.completions.create({ model: "demo", messages, temperature: 0 });
assert.match(whole.choices[0].message.content, /19/);
assert.equal(whole.choices[0].finish_reason, "stop");

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model: "demo", messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, whole.choices[0].message.content);
assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);

const aborted = await client.chat.completions.create({
  model: "demo", messages, stream: true, max_tokens: 2000, ignore_eos: true,
});
for await (const _ of aborted) break; // leaving the loop closes the connection

await assert.rejects(client.chat.completions.create({ model: "nope", messages }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
  return true;
});

const completion = await client.completions.create({ model: "demo", prompt: ["One", "Two"], max_tokens: 3 });
assert.deepEqual(completion.choices.map((choice) => choice.index), [0, 1]);
assert.equal((await client.models.list()).data[0].id, "demo");
console.log("openai-node: all passed");
