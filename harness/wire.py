"""Names, types and limits that client and server share: the contract of the ensemble."""

SAMPLE_RATE_HZ = 24_000
SAMPLES_PER_FRAME = 3_200
FRAMES_PER_SECOND = SAMPLE_RATE_HZ / SAMPLES_PER_FRAME  # 7.5
SECONDS_PER_FRAME = SAMPLES_PER_FRAME / SAMPLE_RATE_HZ  # 0.1333…
MAX_FRAMES = 40_500  # 90 minutes
MAX_SPEAKERS = 4
LATENT_SIZE = 64
SEMANTIC_SIZE = 128
DEFAULT_GUIDANCE_SCALE = 1.3
DEFAULT_DIFFUSION_STEPS = 10
MAX_DIFFUSION_STEPS = 100
NO_VOICE = 0  # the voice id of a speaker without a voice sample

# Models
ENTRY = "vibevoice_full_pipeline"
FRAME = "vibevoice_frame"
LLM = "vibevoice_llm_encoder"
DIFFUSION = "diffusion_decoder"
VOCODER = "neural_vocoder"
VOICE = "voice_encoder"
ENGINE = "vibevoice_engine"  # the whole frame path in one process; deployed under the name of the entry
STAGES = (LLM, DIFFUSION, VOCODER)  # the frame path, in order
MODELS = (ENTRY, FRAME, LLM, DIFFUSION, VOCODER, VOICE)

STAGED, FUSED = "staged", "fused"
TOPOLOGIES = {STAGED: MODELS, FUSED: (ENTRY, VOICE)}  # the models of a server, by how the frame path is deployed

# Counters of the engine on its server's Prometheus page; step counters are labelled by the sessions in a step
ENGINE_STEPS = "vibevoice_engine_steps"
ENGINE_STEP_SECONDS = "vibevoice_engine_step_seconds"
ENGINE_PROMPT_TOKENS = "vibevoice_engine_prompt_tokens"
ENGINE_PROMPT_SECONDS = "vibevoice_engine_prompt_seconds"
ENGINE_BATCH = "batch"  # their label

# Tensors of the entry: (name, Triton type)
TEXT_INPUT = "text_input"  # BYTES [1], UTF-8
SPEAKER_IDS = "speaker_ids"  # INT32 [speakers]: the voice of speaker 1, 2, …; 0 = no voice sample
FRAMES = "frames"  # INT32 [1]: frames to speak; default: as long as the text takes
START_FRAME = "start_frame"  # INT32 [1]: frames counted as spoken already, and the prompt as read
CHUNK_FRAMES = "chunk_frames"  # INT32 [1]: frames in one response
SEED = "seed"  # INT64 [1]: seed of the diffusion noise
GUIDANCE_SCALE = "guidance_scale"  # FP32 [1]
DIFFUSION_STEPS = "diffusion_steps"  # INT32 [1]: denoising steps of every frame
UNTIL_END = "until_end"  # BOOL [1]: stop where the model generates "end of text", at FRAMES at the latest
SAY = "say"  # INT32 [tokens]: forced TOKEN_*, in order; after them the model chooses
KEEP = "keep"  # BOOL [1]: send a CARRY after the last frame
CARRY = "carry"  # UINT8 [bytes]: a kept session to be resumed; whole in a request, in responses in pieces
DESCRIBE = "describe"  # BOOL [1]: respond with a DESCRIPTION instead of speaking
DESCRIPTION = "description"  # BYTES [1], JSON: what each process of the server computes with (StageIdentity)
AGE_S = "age_s"  # in a description: seconds for which the process has served
AUDIO_OUTPUT = "audio_output"  # FP32 [samples]
FRAME_INDEX = "frame_index"  # INT32 [1]: index of the chunk's first frame in this response stream
SENT_AT_NS = "sent_at_ns"  # INT64 [1]: the server's CLOCK_MONOTONIC when the chunk left

EMULATED = "emulated"  # BOOL [1], in the first response: compute times come from a profile, the audio is silent
BEAT_S = "beat_s"  # FP32 [1], in the first response: the longest time until the server sends something again

# Tensors between the stages
TOKEN_IDS = "token_ids"  # INT32 [tokens]
VOICE_FRAMES = "voice_frames"  # FP32 [voice frames x 64], flat
SESSION = "session"  # INT32 [4]: prompt tokens, most frames, frames counted as spoken, 1 = until the model ends
PAST_TOKEN = "past_token"  # INT32 [steps]: tokens of a part of a resumed session
PAST_LATENT = "past_latent"  # FP32 [steps x 64], flat
PAST_SEMANTIC = "past_semantic"  # FP32 [steps x 128], flat
STATE = "state"  # FP32 [values]: a session's convolution state, flat
STEPS = "steps"  # INT32 [1]: denoising steps
PREVIOUS_LATENT = "previous_latent"  # the ensemble's name for the latent of the previous frame
PREVIOUS_SEMANTIC = "previous_semantic"
LATENT = "latent"  # FP32 [64]
SEMANTIC = "semantic"  # FP32 [128]
CONDITION = "condition"  # FP32 [2, hidden]: with and without the prompt
TOKEN = "token"  # INT32 [1]: one of the TOKEN_* below
NOISE = "noise"  # FP32 [64]
GUIDANCE = "guidance"  # FP32 [1]
AUDIO = "audio"  # FP32 [3200]
WAVEFORM = "waveform"  # FP32 [samples]

# Next tokens of the LLM stage, independent of a checkpoint's own token ids
TOKEN_SPEECH_FRAME = 0
TOKEN_SPEECH_BEGIN = 1
TOKEN_SPEECH_END = 2
TOKEN_END_OF_TEXT = 3

# Messages in a server's log, after the name of a model whose process ended
LOADED_AGAIN = " ended and was loaded again"
NOT_LOADED = " ended and cannot be loaded again"

BUSY = "busy: "  # prefix of a stage's message that it has no room for a session now
REFUSED = "refused: "  # prefix of a message that no server of this model can serve the request: no retry helps

DILATION = "dilation"  # parameter of emulated models: how many times slower than their GPU they run

AUTO = "auto"
AUTO_PARAMETERS = ("kv_limit_bytes", "device", "dtype", "graphs")  # may be left to the stage
# Parameters of a config.pbtxt that are numbers: (type, lowest)
NUMBERS = {
    "weights_seed": (int, 0),
    "gpus": (int, 1),
    DILATION: (float, 1),
    "kv_limit_bytes": (int, 1),
    "graphs": (int, 0),
    "sessions_at_once": (int, 1),
    "max_batch": (int, 1),
    "prefill_tokens": (int, 1),
    "prefills_at_once": (int, 1),
    "waiting_limit": (int, 0),
    "waiting_seconds": (float, 0),
    "beat_seconds": (float, 0.1),
    "in_hand_seconds": (float, 0),
}
