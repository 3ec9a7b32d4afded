"""A voice agent with a face, on separate models for hearing, thinking and speaking.

    pip install voipavatar livekit-plugins-deepgram livekit-plugins-openai livekit-plugins-silero
    export LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=...
    export DEEPGRAM_API_KEY=... OPENAI_API_KEY=...
    python examples/agent_pipeline.py dev

Text that is typed on `lk.chat` is answered too: that is the session's default.
"""

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import deepgram, openai, silero, voipavatar

server = AgentServer()


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    await ctx.connect()
    session = AgentSession(
        vad=silero.VAD.load(),
        stt=deepgram.STT(model="nova-3"),
        llm=openai.LLM(model="gpt-4o-mini"),
        tts=openai.TTS(voice="alloy"),
        resume_false_interruption=False,
    )
    avatar = voipavatar.AvatarSession(persona="default")

    # If the avatar is lost the agent speaks for itself, and gives the word back when it returns.
    avatar.on("avatar_lost", lambda reason: ctx.log_context_fields.update(avatar="lost"))
    avatar.on("avatar_joined", lambda: ctx.log_context_fields.update(avatar="here"))

    await avatar.start(session, ctx.room)
    await session.start(agent=Agent(instructions="You are a helpful guide."), room=ctx.room)
    await session.say("Hello. What can I do for you?")


if __name__ == "__main__":
    cli.run_app(server)
