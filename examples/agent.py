"""A voice agent with a face, on a realtime model.

    pip install voipavatar livekit-plugins-google
    export LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=... GOOGLE_API_KEY=...
    python examples/agent.py dev

The avatar runs in this process. With `voipavatar worker` on another machine, set
VOIPAVATAR_AGENT_NAME=voipavatar here and nothing else changes. examples/agent.yaml is the same
without Python.
"""

from livekit.agents import Agent, AgentServer, AgentSession, AutoSubscribe, JobContext, cli
from livekit.plugins import google, voipavatar

server = AgentServer()


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    await ctx.connect(auto_subscribe=AutoSubscribe.AUDIO_ONLY)  # not to decode its own picture
    session: AgentSession[None] = AgentSession(
        llm=google.realtime.RealtimeModel(voice="Puck"),
        # An avatar stops; it can't be paused in mid-word.
        turn_handling={"interruption": {"resume_false_interruption": False}},
    )
    avatar = voipavatar.AvatarSession(persona="default")
    await avatar.start(session, ctx.room)
    await session.start(
        agent=Agent(instructions="You are a friendly guide. Keep answers to two sentences."),
        room=ctx.room,
    )
    await ctx.wait_for_participant()
    await session.generate_reply(instructions="Greet the user and ask what you can do.")


if __name__ == "__main__":
    cli.run_app(server)
