"""A voice agent with a face, on separate models for hearing, thinking and speaking.

    pip install voipavatar livekit-plugins-deepgram livekit-plugins-openai
    export LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=...
    export DEEPGRAM_API_KEY=... OPENAI_API_KEY=...
    python examples/agent_pipeline.py dev

Text that is typed on `lk.chat` is answered too: that is the session's default. So is a VAD (Silero,
which comes with livekit-agents). examples/agent.yaml is the same without Python.
"""

from livekit.agents import Agent, AgentServer, AgentSession, AutoSubscribe, JobContext, cli
from livekit.plugins import deepgram, openai, voipavatar

server = AgentServer()


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    await ctx.connect(auto_subscribe=AutoSubscribe.AUDIO_ONLY)  # not to decode its own picture
    session: AgentSession[None] = AgentSession(
        stt=deepgram.STT(model="nova-3"),
        llm=openai.LLM(model="gpt-4.1-mini"),
        tts=openai.TTS(voice="alloy"),
        # An avatar stops; it can't be paused in mid-word.
        turn_handling={"interruption": {"resume_false_interruption": False}},
        use_tts_aligned_transcript=True,  # captions by the voice's own times, where it tells them
    )
    avatar = voipavatar.AvatarSession(persona="default")

    # If the avatar is lost the agent speaks for itself, and gives the word back when it returns.
    avatar.on("avatar_lost", lambda reason: ctx.log_context_fields.update(avatar="lost"))
    avatar.on("avatar_joined", lambda: ctx.log_context_fields.update(avatar="here"))

    await avatar.start(session, ctx.room)
    await session.start(agent=Agent(instructions="You are a helpful guide."), room=ctx.room)
    await ctx.wait_for_participant()
    await session.say("Hello. What can I do for you?")


if __name__ == "__main__":
    cli.run_app(server)
