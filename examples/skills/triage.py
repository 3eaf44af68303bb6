"""Triage: how urgent a complaint is. Each of three urgencies has 67 complaints, each with the reason for it.

Made up for practice in writing a fixed form. It is not medical advice, and nobody with medical training has checked it.
"""

from __future__ import annotations

from typing import NamedTuple


class Urgency(NamedTuple):
    """An urgency, what to do next, and complaints with their reasons."""

    name: str
    next_steps: list[str]
    complaints: list[tuple[str, str]]


def _urgency(name: str, next_steps: list[str], lines: str) -> Urgency:
    complaints = [tuple(part.strip() for part in line.split(" | ")) for line in lines.strip().splitlines()]
    return Urgency(name, next_steps, [(complaint, reason) for complaint, reason in complaints])


#: What stands around a complaint.
FRAMES = [
    'Practice case, not a real patient. {person} says: "{complaint}" Triage it.',
    'An invented patient for triage practice. {person} reports: "{complaint}" Write the triage form.',
    'Triage exercise with a made-up patient. {person} writes: "{complaint}" Fill in the form.',
]

#: Any of them may have any of the complaints.
PERSONS = [
    "A teacher of 34",
    "A driver of 41",
    "A cook of 29",
    "A farmer of 38",
    "A student of 23",
    "A clerk of 44",
    "A baker of 31",
    "A painter of 36",
    "A singer of 27",
    "A gardener of 43",
    "A tailor of 39",
    "A librarian of 32",
    "A carpenter of 28",
    "A lawyer of 37",
]

FORM = "Urgency: {urgency}\nReason: {reason}\nNext step: {next_step}\nNote: Practice only, not medical advice."

URGENCIES = [
    _urgency(
        "emergency",
        ["Call an ambulance now.", "Call the emergency number at once.", "Get emergency help and do not wait."],
        """There is a crushing pain in my chest and my left arm is numb. | This may be a heart attack.
        I cannot breathe and my lips are turning blue. | The body gets too little oxygen.
        One side of my face droops and my words are slurred. | This may be a stroke.
        I cut my wrist on glass and blood is spurting out. | Heavy bleeding can kill within minutes.
        My throat is swelling shut after a bee sting. | This may be a severe allergic reaction.
        I drank a cup of drain cleaner by mistake. | The poison burns the throat and stomach.
        I fell off the roof and cannot feel my legs. | The spine may be injured.
        My husband shakes all over and does not wake up. | A long seizure is dangerous.
        I have the worst headache of my life and it came in one second. | There may be bleeding in the brain.
        I am vomiting a lot of bright red blood. | There is bleeding inside.
        My chest was hit in a crash and each breath gets harder. | A lung may have collapsed.
        My son emptied a box of my heart pills. | A few of these pills can stop a heart.
        Boiling oil ran over my face and both arms. | The burn is large and deep.
        My arm went limp all of a sudden and I cannot lift it. | This may be a stroke.
        I was pulled from the lake and I am coughing up foam. | Water in the lungs stops breathing.
        My heart races at 190, I feel faint and my chest hurts. | The heart rhythm may be failing.
        I ate peanuts and now my tongue fills my whole mouth. | The airway is closing.
        A snake bit me and my leg is swelling up to the hip. | The venom is spreading.
        I was stabbed in the belly with a knife. | A deep wound may reach an organ.
        I stopped sweating in the heat and I am very confused. | This may be heat stroke.
        A piece of meat is stuck and I can hardly get air. | The airway is blocked.
        I touched a power line and was thrown to the ground. | A strong shock can stop the heart.
        My bone is sticking out through the skin of my leg. | An open fracture bleeds and gets infected.
        I suddenly cannot see anything with either eye. | Sudden blindness may be a stroke.
        I am pregnant and soaked in blood, with terrible pain. | Mother and child are in danger.
        My inhaler does nothing and I cannot finish a sentence. | This is a severe asthma attack.
        I hit my head, passed out, and now I keep vomiting. | There may be pressure on the brain.
        I have a stiff neck, high fever and purple spots that spread. | This may be meningitis.
        The saw took off two of my fingers. | The bleeding must be stopped at once.
        I was in a fire and my voice is hoarse and full of soot. | Smoke has burned the airway.
        My father fell down and has no pulse. | The heart has stopped.
        Bleach splashed in both eyes and I see only white. | The eyes may be lost.
        The garage was full of fumes and I keep passing out. | This may be carbon monoxide poisoning.
        I have a tearing pain from my chest through to my back. | A large artery may be tearing.
        I sank into the snow for hours and I no longer shiver. | The body is dangerously cold.
        My diabetic wife is limp and will not wake up. | Her blood sugar may be far too low.
        A nail from the nail gun went into my chest. | The heart or a lung may be hit.
        The tree fell on me and I cannot breathe out. | The chest is crushed.
        My leg was crushed under the tractor and is cold and white. | No blood reaches the leg.
        I pass black tar and faint each time that I stand up. | There is heavy bleeding inside.
        I ate wild mushrooms and now I cannot keep my eyes open. | The mushrooms may be deadly.
        My belly is as hard as a board and the pain is unbearable. | Something in the belly may have burst.
        I was shot in the shoulder. | A gunshot wound bleeds inside.
        My newborn is blue and does not cry. | A newborn needs oxygen at once.
        I dived into shallow water and my neck hurts and my hands tingle. | The neck may be broken.
        I breathe forty times a minute and my skin is grey. | The lungs are failing.
        My face, my arms and my whole body broke out in hives and I am dizzy. | The blood pressure may be falling.
        I lost feeling on my right side while I was eating. | This may be a stroke.
        A dog tore my neck open and it will not stop bleeding. | The wound is close to a large vessel.
        I sat down with pain in my jaw and cold sweat all over. | This may be a heart attack.
        I swallowed a button battery. | The battery burns through the gullet.
        My calf swelled up and now I cannot catch my breath. | A clot may have gone to the lung.
        I woke up on the floor and my tongue is bitten and bleeding. | This was a first seizure.
        My home smells of gas and everyone here is dizzy and sick. | The gas is poisoning them.
        I have a fever of 41 and I see people who are not there. | The brain suffers from the heat.
        I took a double dose of my heart drops and my pulse is 30. | The heart beats too slowly.
        The machine caught my hair and tore my scalp off. | This is a severe wound.
        A steel splinter is stuck in my eyeball. | The eye may be lost.
        I am nine months pregnant and the cord is hanging out. | The child gets no blood.
        My chest feels like an elephant sits on it. | This may be a heart attack.
        I inhaled chlorine at the pool and I cannot stop choking. | The gas harms the lungs.
        My friend drank a whole bottle of vodka and does not react. | This is alcohol poisoning.
        A car ran over my hips and I cannot move. | The pelvis may be broken and bleeding.
        I spray blood from a varicose vein and the towel is soaked. | Heavy bleeding has to be stopped.
        I choke on my own spit and my eyelids no longer open. | The muscles for breathing may fail.
        I woke up and could not speak a word. | This may be a stroke.
        My skin peels off in sheets after a new drug. | This reaction threatens life.""",
    ),
    _urgency(
        "today",
        ["See a doctor today.", "Call the practice for a visit today.", "Go to a walk-in clinic before tonight."],
        """It burns when I pass water and I have a fever since yesterday. | The infection may reach the kidneys.
        A cat bit my hand last night and it is red and warm. | Cat bites get infected quickly.
        My ear has hurt badly all night and now it runs. | The ear is likely infected.
        I twisted my ankle and cannot put weight on it. | A bone may be broken.
        My throat is so sore that I can only sip water. | It may need treatment to prevent an abscess.
        One eye is red, painful and hurts in bright light. | The inside of the eye may be inflamed.
        I have had a fever of 39 for four days. | A fever that lasts needs a cause.
        The cut on my foot is hot and pus comes out. | The wound is infected.
        I have thrown up all day and keep no water down. | The body is drying out.
        The pain began at my navel and is now low on the right. | This may be the appendix.
        My tooth hurts and my cheek is thick and hot. | There may be an abscess under the tooth.
        A red streak runs up my arm from a scratch. | The infection is spreading.
        I cough up green slime and have a fever and chills. | This may be pneumonia.
        My calf is swollen, warm and sore on one side only. | There may be a clot in the leg.
        A painful rash of blisters came up in a band on my ribs. | Shingles is treated best on the first days.
        I cut my thumb and the edges of the wound gape. | The wound needs stitches.
        I stepped on a rusty nail and never had a tetanus shot. | A tetanus shot is due within a day.
        My finger is bent the wrong way after a ball hit it. | The finger may be broken.
        My blood sugar has been over 300 since this morning. | It has to be brought down.
        I see blood in my urine and my side aches. | This may be a kidney stone.
        I removed a tick and now a red ring grows around the spot. | This may be an infection from the tick.
        My heart has skipped beats since breakfast but I feel well. | The rhythm should be checked soon.
        I burned my palm on the stove and it has big blisters. | Burns of the hand need care.
        I have had bloody diarrhoea since last night. | The bowel may be infected.
        A bat flew into me and scratched my neck. | Rabies shots must begin soon.
        My knee is hot, red and so stiff that I cannot bend it. | The joint may be infected.
        My eyelids and skin have turned yellow over the weekend. | The liver may be ill.
        The hearing in my right ear went away this morning. | Sudden hearing loss is treated early.
        I ran out of my blood pressure pills and it is 180. | The pressure is too high to wait.
        I am six weeks pregnant and have light bleeding. | Bleeding in pregnancy is checked soon.
        My asthma wakes me each night and I use the spray every four hours. | The asthma is getting out of control.
        I have floaters and flashes in one eye since noon. | The retina may be torn.
        My toe is dark red, swollen and I have diabetes. | Foot infections are risky in diabetes.
        I have not been able to pass water since last night. | The bladder may be blocked.
        The stitches from my operation have opened a little. | The wound has to be closed again.
        My baby has a fever of 38.5 and drinks half as much. | A small child dries out quickly.
        I fell on my hand and my wrist is swollen and crooked. | The wrist may be broken.
        A boil on my back has grown to the size of an egg. | It may need to be opened.
        The whites of my eyes are stuck together with yellow pus. | The eyes are infected.
        I get cramps and pain each time that I press my belly. | The belly has to be examined.
        I was sick after my new pills and my skin itches all over. | The drug may not be tolerated.
        My breast is red, hard and hot while I nurse. | The breast is inflamed.
        I have a headache and fever and light hurts a little. | The cause of the fever must be found.
        My face hurts, my nose runs green and my eye is swollen. | The infection may spread to the eye.
        I was hit in the eye by a ball and see blurry. | The eye may be injured.
        My wound dressing is soaked through with yellow fluid. | The wound may be infected.
        I have vomited since a meal of old fish and feel weak. | This may be food poisoning.
        My back pain shoots down both legs since this morning. | Nerves may be pressed.
        I have pain in one testicle since I woke up. | It may be twisted or inflamed.
        I feel dizzy and weak since I doubled my water pills. | The body may have lost too much salt.
        A fish bone stuck in my throat but I can breathe and drink. | The bone has to be taken out.
        My gum has bled for six hours after the tooth was pulled. | The bleeding has to be stopped.
        I have a hot swollen leg with shiny red skin. | The skin is infected.
        The hornet sting on my arm swells past the elbow. | The swelling is strong and grows.
        My nose bleeds again and again and I take blood thinners. | The thinner makes bleeding last.
        I have hiccups, fever and sharp pain when I breathe in. | The lining of the lung may be inflamed.
        A dog bit my calf and left four deep holes. | Bites have to be cleaned and checked.
        The contact lens scratched my eye and it waters all day. | The surface of the eye may be hurt.
        My dad is more confused than usual and has a slight fever. | In old people this can be an infection.
        My nail was torn half off in the door. | The nail bed needs care.
        I threw up four times and have not eaten for two days. | The body needs fluid.
        My tonsils have white spots and I have a fever. | This may be a bacterial infection.
        The skin around my drip from the hospital is red and sore. | The vein may be inflamed.
        I lost my balance twice today and my ears ring. | The inner ear may be ill.
        I think that I broke a rib, since it hurts to cough. | The ribs should be examined.
        A needle from the bin pricked my thumb. | Treatment works only in the first days.
        I got metal dust in my eye and it still scratches. | The dust has to be rinsed out.""",
    ),
    _urgency(
        "home",
        ["Rest at home and watch it.", "Care for it at home.", "Stay at home and ask a pharmacist if needed."],
        """I have a runny nose and sneeze a lot. | A cold goes away by itself.
        I scraped my knee a little on the pavement. | A small graze heals by itself.
        A mosquito bit my arm and it itches. | The itch fades within days.
        My muscles are sore after a long run. | Sore muscles recover with rest.
        I have a mild headache after too much screen time. | A mild headache passes with rest.
        There is a tiny blister on my heel from new shoes. | A small blister dries by itself.
        My lips are dry and chapped from the wind. | Dry lips heal with balm.
        I got a slight sunburn on my shoulders. | A light sunburn fades within days.
        I have hiccups since lunch. | Hiccups stop by themselves.
        I bit my tongue while I was eating and it is a bit sore. | The mouth heals quickly.
        My nose is stuffy in the morning. | A stuffy nose is harmless.
        I got a paper cut on my finger. | A paper cut closes by itself.
        My stomach rumbles and I have some gas. | Gas passes by itself.
        I have a small bruise on my arm from a table. | A bruise fades within two weeks.
        My feet smell and sweat in summer. | This is harmless and helped by washing.
        My eyes are tired after I read all evening. | Tired eyes need rest.
        My back is a bit stiff after I worked in the garden. | Light movement loosens the back.
        I have a pimple on my chin. | A pimple heals by itself.
        My throat tickles a little but I feel fine. | A slight tickle is part of a cold.
        I slept badly for one night. | One bad night does no harm.
        My skin is dry and flaky in winter. | Dry skin is helped by cream.
        I ate too much and feel full. | The full feeling passes.
        A splinter was in my finger and I pulled it out. | The small hole closes by itself.
        I have a slight cough after a cold. | The cough fades in time.
        My hands are rough from washing dishes. | Hand cream helps rough skin.
        A nettle stung my leg and it tingles. | The sting fades within hours.
        I have dandruff on my scalp. | A mild shampoo helps.
        I feel a bit sick on long car trips. | Travel sickness ends with the trip.
        My legs feel heavy after I stood all day. | The legs recover when raised.
        I have a corn on my small toe. | A corn is harmless and can be padded.
        My baby tooth is loose, says my child. | Loose baby teeth are normal.
        I feel tired after a long week at work. | Rest brings the strength back.
        I burned my tongue a little on hot tea. | A slight burn in the mouth heals in days.
        My nails break easily. | Brittle nails are harmless.
        I have had a cold sore on my lip since yesterday. | A cold sore dries within ten days.
        I sneeze in spring when the birch trees bloom. | This is a mild allergy.
        I bumped my elbow and it tingled for a minute. | The nerve was only knocked.
        I have a light hangover after the party. | It passes with water and rest.
        A wasp stung my finger and it hurts a bit. | A small sting is harmless.
        My neck is stiff because I slept in a bad position. | A stiff neck loosens in days.
        I have mild heartburn after spicy food. | Mild heartburn passes.
        My hair falls out a little more in autumn. | Some hair loss is normal.
        I have a small mouth ulcer on my cheek. | Mouth ulcers heal in a week.
        I feel cold easily in the office. | Warm clothes are enough.
        My voice is a bit hoarse after I sang all night. | The voice recovers with rest.
        I yawn all day after the time change. | The body adjusts within days.
        My ears popped on the plane and feel dull. | The pressure evens out.
        I got soap in my eye and rinsed it and now it is fine. | The eye was rinsed in time.
        I have a wart on my hand that does not hurt. | Most warts go away in time.
        I stubbed my toe and it is a little sore, but I walk well. | A light bump heals by itself.
        My child has a runny nose but plays happily. | A happy child with a cold can rest.
        My arm is sore where I got a vaccine yesterday. | A sore arm is normal after a shot.
        I have not had a bowel movement since the day before yesterday. | Water and fruit usually help.
        My calf cramped last night and is fine now. | A short cramp is harmless.
        My skin itches a little from a wool jumper. | The itch ends without the wool.
        I feel nervous before my exam. | It is normal to be nervous.
        The hot weather makes me sweat and feel slow. | Shade and water help.
        I have a little rash where my watch sits. | The skin calms down without the watch.
        My gums bled a bit when I used new floss. | Gums get used to floss.
        I have loose stools since a rich dinner but feel well. | Light food settles the bowel.
        My shoulder aches slightly after tennis. | A light strain heals with rest.
        I have chilblains that itch on my toes. | Warm socks help.
        My eyelid twitches when I am tired. | A twitch is harmless.
        I have a stye that is small and does not hurt much. | A warm cloth helps a stye.
        I scratched my leg on a rose bush. | A shallow scratch heals by itself.
        I lost my appetite for one day. | The appetite usually returns.
        I get goose bumps and a dry mouth before I speak in public. | Stage fright is harmless.""",
    ),
]
